//! All formats: values as each format's own library writes them, tolerated deviations, round trips, and garbage.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

#[path = "../fuzz/decode.rs"]
#[allow(unreachable_pub, reason = "the fuzz targets include this file too")]
mod decode;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::time::Duration;

use decode::check;
use proptest::prelude::*;
use support::{client, etcd, eventually, knows, list};
use tokio::time::Instant;
use tonic_etcd::{
    AddressPolicy, Format, Instance, Registry, error::FormatError, format::InstanceFormat,
};

/// All formats that can be read.
const FORMATS: [Format; 13] = [
    Format::EtcdNaming,
    Format::Plain,
    Format::Url,
    Format::GoZero,
    Format::Kratos,
    Format::Kitex,
    Format::GoMicro,
    Format::Rpcx,
    Format::DubboInterface,
    Format::DubboApplication,
    Format::GoFrame,
    Format::AddressInKey,
    Format::Mixed,
];

/// A key and its value from a golden file, and the expected result of reading them.
struct Golden {
    key: String,
    value: String,
    read: String,
}

fn golden(format: &Format) -> Vec<Golden> {
    let mut name = String::new();
    for letter in format!("{format:?}").chars() {
        if letter.is_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.extend(letter.to_lowercase());
    }
    let path = format!("{}/tests/golden/{name}.txt", env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let mut found = Vec::new();
    let mut record = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if let Some((name, rest)) = line.split_once(':') {
            record.insert(name, rest.trim().to_owned());
        }
        if let Some(read) = record.remove("read") {
            let value = record.remove("value").unwrap();
            let value = match value.strip_suffix("\\n") {
                Some(value) => format!("{value}\n"),
                None => value,
            };
            let key = record.remove("key").unwrap();
            found.push(Golden { key, value, read });
        }
    }
    assert!(!found.is_empty(), "{path} has no values");
    found
}

/// Returns all attributes of an instance on one line, or `-` without an instance.
fn summary(instance: Option<&Instance>) -> String {
    let Some(instance) = instance else {
        return "-".to_owned();
    };
    let mut line = format!("{} weight={}", instance.address(), instance.weight());
    for (name, value) in [("zone", instance.zone()), ("version", instance.version())] {
        if let Some(value) = value {
            write!(line, " {name}={value}").unwrap();
        }
    }
    for (is_set, word) in [
        (instance.is_tls(), "tls"),
        (instance.is_leaving(), "leaving"),
    ] {
        if is_set {
            write!(line, " {word}").unwrap();
        }
    }
    for (name, value) in instance.metadata() {
        write!(line, " {name}={value}").unwrap();
    }
    line
}

fn read(format: &Format, key: &str, value: &str) -> Result<String, FormatError> {
    let instance = format.decode(key, value.as_bytes(), &AddressPolicy::default())?;
    Ok(summary(instance.as_ref()))
}

/// Returns a JSON value in a normal form, because writers differ in the order of fields and in the characters that they escape. Returns
/// other values unchanged.
fn canonical(value: &str) -> String {
    match serde_json::from_str::<serde_json::Value>(value) {
        Ok(json) => json.to_string(),
        Err(_) => value.to_owned(),
    }
}

/// All formats that can be written.
fn written() -> impl Iterator<Item = Format> {
    FORMATS
        .into_iter()
        .filter(|format| *format != Format::Mixed)
}

#[test]
fn values_written_by_the_original_libraries_are_read() {
    for format in written() {
        for Golden {
            key,
            value,
            read: expected,
        } in golden(&format)
        {
            let read = read(&format, &key, &value);
            assert_eq!(read.as_deref(), Ok(&*expected), "{format:?} {key} {value}");
        }
    }
}

#[test]
fn reading_then_writing_keeps_all_fields_of_the_format() {
    for format in written() {
        for Golden { key, value, .. } in golden(&format) {
            let read = format.decode(&key, value.as_bytes(), &AddressPolicy::default());
            let Some(instance) = read.unwrap() else {
                continue;
            };
            let again = format.encode(&key, &instance).unwrap();
            let again = String::from_utf8(again).unwrap();
            let trimmed = value.trim_end();
            let same = canonical(again.trim_end()) == canonical(trimmed)
                || EQUAL.contains(&(trimmed, again.trim_end()));
            assert!(same, "{format:?}\n{trimmed}\n{again}");
            // Adding metadata loses no fields either.
            let renamed = instance.clone().with_metadata("added", "1");
            if let Ok(changed) = format.encode(&key, &renamed) {
                let changed = String::from_utf8(changed).unwrap();
                let changed = format.decode(&key, changed.as_bytes(), &AddressPolicy::default());
                let expected = format!("{} added=1", summary(Some(&instance)));
                let mut words: Vec<_> = expected.split(' ').collect();
                let changed = summary(changed.unwrap().as_ref());
                let mut found: Vec<_> = changed.split(' ').collect();
                words.sort_unstable();
                found.sort_unstable();
                assert_eq!(found, words, "{format:?}");
            }
        }
    }
}

/// Values that change when they are read and written again: the value that is read, and the value that is written. The format's own readers
/// treat both in the same way.
const EQUAL: &[(&str, &str)] = &[
    (
        r#"{"Addr":"1.2.3.4:8080","Metadata":"..."}"#,
        r#"{"Op":0,"Addr":"1.2.3.4:8080","Metadata":"..."}"#,
    ),
    (
        "https://greeter.example.org/base?x=1",
        "https://greeter.example.org:443/base?x=1",
    ),
];

#[test]
fn reading_then_writing_keeps_keys_that_contain_more_than_the_address() {
    for (format, prefix) in [
        (Format::Rpcx, "/rpcx_test/"),
        (Format::DubboInterface, "/dubbo/"),
        (Format::GoFrame, "/service/default/default/"),
        (Format::AddressInKey, ""),
    ] {
        for Golden { key, value, .. } in golden(&format) {
            let read = format.decode(&key, value.as_bytes(), &AddressPolicy::default());
            let Some(instance) = read.unwrap() else {
                continue;
            };
            let service = key.strip_prefix(prefix).unwrap().split('/').next().unwrap();
            let again = format.key(Some(prefix), service, &instance).unwrap();
            // rpcx treats a key without a network as TCP.
            let key = key.replace("/10.0.0.10:", "/tcp@10.0.0.10:");
            assert_eq!(again, key, "{format:?}");
        }
    }
}

#[test]
fn deviations_of_the_original_libraries_are_tolerated() {
    for (format, key, value, expected) in TOLERATED {
        let read = read(format, key, value);
        assert_eq!(read.as_deref(), Ok(*expected), "{format:?} {key} {value}");
        check(format, key, value.as_bytes());
    }
}

/// Values that differ from those of the format's own library, because parts are missing or added: the format, the key, the value, and the
/// expected result of reading it. Each tolerated deviation has at least one value.
const TOLERATED: &[(Format, &str, &str, &str)] = &[
    // Field names in any case, as in Go's decoder; unknown fields; no `Op`; an `Op` that means delete.
    (
        Format::EtcdNaming,
        "s/a",
        r#"{"addr":"1.1.1.1:1","x":[1]}"#,
        "1.1.1.1:1 weight=1",
    ),
    (
        Format::EtcdNaming,
        "s/a",
        r#"{"Op":1,"Addr":"1.1.1.1:1"}"#,
        "1.1.1.1:1 weight=1",
    ),
    (
        Format::EtcdNaming,
        "s/a",
        r#"{"Addr":"1.1.1.1:1","Metadata":[1]}"#,
        "1.1.1.1:1 weight=1 Metadata=[1]",
    ),
    (
        Format::EtcdNaming,
        "s/a",
        r#"{"Addr":"1.1.1.1:1","Metadata":{"weight":"4","a":null,"b":{"c":1},"zone":2}}"#,
        r#"1.1.1.1:1 weight=4 b={"c":1} zone=2"#,
    ),
    (
        Format::EtcdNaming,
        "s/a",
        r#"{"Addr":"1.1.1.1:1","Metadata":{"weight":-3,"leaving":true}}"#,
        "1.1.1.1:1 weight=1 leaving",
    ),
    (
        Format::EtcdNaming,
        "s/a",
        r#"{"Addr":"1.1.1.1:1","Metadata":{"weight":1e300}}"#,
        "1.1.1.1:1 weight=1000000",
    ),
    // Flags that mark an instance as out of service; lists in which some entries cannot be used.
    (
        Format::EtcdNaming,
        "s/a",
        r#"{"Addr":"1.1.1.1:1","Healthy":false}"#,
        "-",
    ),
    (
        Format::EtcdNaming,
        "s/a",
        r#"{"Addr":"1.1.1.1:1","enabled":"FALSE"}"#,
        "-",
    ),
    (
        Format::EtcdNaming,
        "s/a",
        r#"{"Addr":"1.1.1.1:1","enabled":true,"Metadata":{"enabled":false}}"#,
        "1.1.1.1:1 weight=1 enabled=false",
    ),
    (
        Format::Kratos,
        "/m/s/i",
        r#"{"disabled":true,"endpoints":["grpc://1.1.1.1:1"]}"#,
        "-",
    ),
    (
        Format::Kratos,
        "/m/s/i",
        r#"{"endpoints":["grpc://1.1.1.1","grpc://u:p@2.2.2.2:2","grpcs://3.3.3.3:3"]}"#,
        "3.3.3.3:3 weight=100 tls",
    ),
    (
        Format::Kitex,
        "k/s/a",
        r#"{"address":"1.1.1.1:1","unhealthy":true}"#,
        "-",
    ),
    (
        Format::GoMicro,
        "/m/s/i",
        r#"{"nodes":[{"address":"nowhere"},{"id":"x"},{"address":"3.3.3.3:3","healthy":false},{"address":"4.4.4.4:4"}]}"#,
        "4.4.4.4:4 weight=1",
    ),
    (
        Format::GoMicro,
        "/m/s/i",
        r#"{"disabled":true,"nodes":[{"address":"4.4.4.4:4"}]}"#,
        "-",
    ),
    (
        Format::DubboApplication,
        "/s/a/i",
        r#"{"Host":"1.1.1.1","Port":9,"Disabled":"true"}"#,
        "-",
    ),
    (
        Format::DubboApplication,
        "/s/a/i",
        r#"{"Host":"1.1.1.1","Metadata":{"dubbo.endpoints":"[{\"port\":0,\"protocol\":\"tri\"},{\"port\":2,\"protocol\":\"grpc\"}]"}}"#,
        "1.1.1.1:2 weight=100",
    ),
    (
        Format::DubboInterface,
        "/d/s/providers/tri%3A%2F%2F1.1.1.1%3A1%2Fs%3Fdisabled%3Dtrue",
        "",
        "-",
    ),
    (
        Format::GoFrame,
        "/s/d/d/n/latest/nowhere,2.2.2.2:2",
        "",
        "2.2.2.2:2 weight=1",
    ),
    (Format::Plain, "s/a", " 1.1.1.1:1\r\n", "1.1.1.1:1 weight=1"),
    (Format::Url, "s/a", "HTTP://1.1.1.1", "1.1.1.1:80 weight=1"),
    (
        Format::Url,
        "s/a",
        "https://[::1]",
        "[::1]:443 weight=1 tls",
    ),
    (
        Format::Url,
        "s/a",
        "tri://1.1.1.1:1/x?y#z\n",
        "1.1.1.1:1 weight=1",
    ),
    (Format::GoZero, "k/1", "1.1.1.1:1\n", "1.1.1.1:1 weight=1"),
    (
        Format::Kratos,
        "/m/s/i",
        r#"{"endpoints":["grpc://1.1.1.1:1"]}"#,
        "1.1.1.1:1 weight=100",
    ),
    (
        Format::Kratos,
        "/m/s/i",
        r#"{"NAME":"s","Endpoints":[null,1,"grpc://1.1.1.1:1"],"metadata":null}"#,
        "1.1.1.1:1 weight=100",
    ),
    (
        Format::Kratos,
        "/m/team/s/i",
        r#"{"name":"team/s","endpoints":["grpc://1.1.1.1:1"]}"#,
        "1.1.1.1:1 weight=100",
    ),
    (
        Format::Kratos,
        "/m/xs/i",
        r#"{"name":"s","endpoints":["grpc://1.1.1.1:1"]}"#,
        "-",
    ),
    (
        Format::Kratos,
        "/m/s/i",
        r#"{"metadata":{"weight":"x","version":"2"},"version":"1","endpoints":["grpc://1.1.1.1:1"]}"#,
        "1.1.1.1:1 weight=100 version=1 version=2",
    ),
    (
        Format::Kitex,
        "k/s/a",
        r#"{"address":"1.1.1.1:1"}"#,
        "1.1.1.1:1 weight=10",
    ),
    (
        Format::Kitex,
        "k/s/a",
        r#"{"Address":"1.1.1.1:1","weight":-1,"tags":{"leaving":"true"}}"#,
        "1.1.1.1:1 weight=10 leaving",
    ),
    (
        Format::GoMicro,
        "/m/s/i",
        r#"{"nodes":[null,{"address":"1.1.1.1:1"}]}"#,
        "1.1.1.1:1 weight=1",
    ),
    (
        Format::GoMicro,
        "/m/s/i",
        r#"{"version":"latest","nodes":[{"address":"1.1.1.1:1","metadata":{"protocol":"http"}},{"address":"2.2.2.2:2","metadata":null}]}"#,
        "2.2.2.2:2 weight=1",
    ),
    (Format::Rpcx, "/b/s/tcp@1.1.1.1:1", "", "1.1.1.1:1 weight=1"),
    (
        Format::Rpcx,
        "/b/s/tcp@1.1.1.1:1",
        "weight=2&weight=3&a=b+c%20%26&d&%zz=1\n",
        "1.1.1.1:1 weight=2 %zz=1 a=b c & d=",
    ),
    (
        Format::Rpcx,
        "/b/s/tcp@[::1]:1",
        "state=active",
        "[::1]:1 weight=1 state=active",
    ),
    (
        Format::DubboInterface,
        "/d/s/providers/tri%3A%2F%2F1.1.1.1%3A1%2Fs",
        "x",
        "1.1.1.1:1 weight=100",
    ),
    (
        Format::DubboInterface,
        "/d/s/providers/grpc%3A%2F%2F1.1.1.1%3A1%2Fs%3Fweight%3D0",
        "",
        "1.1.1.1:1 weight=100",
    ),
    (
        Format::DubboInterface,
        "/d/s/routers/tri%3A%2F%2F1.1.1.1%3A1%2Fs",
        "",
        "-",
    ),
    (
        Format::DubboApplication,
        "/s/a/i",
        r#"{"Host":"1.1.1.1","Port":1}"#,
        "1.1.1.1:1 weight=100",
    ),
    (
        Format::DubboApplication,
        "/s/a/i",
        r#"{"host":"::1","port":1,"Metadata":null}"#,
        "[::1]:1 weight=100",
    ),
    (
        Format::DubboApplication,
        "/s/a/i",
        r#"{"Address":"1.1.1.1:1","Weight":-1,"Metadata":{"dubbo.endpoints":"?"}}"#,
        "1.1.1.1:1 weight=100",
    ),
    (
        Format::DubboApplication,
        "/s/a/i",
        r#"{"Address":"1.1.1.1:1","Metadata":{"dubbo.endpoints":"[{\"port\":2,\"protocol\":\"grpc\"}]"}}"#,
        "1.1.1.1:2 weight=100",
    ),
    (
        Format::DubboApplication,
        "/s/a/i",
        r#"{"Address":"1.1.1.1:1","Healthy":false}"#,
        "-",
    ),
    (
        Format::GoFrame,
        "/s/d/d/n/latest/1.1.1.1:1",
        "",
        "1.1.1.1:1 weight=1",
    ),
    (
        Format::GoFrame,
        "/s/d/d/n/latest/1.1.1.1:1",
        "null\n",
        "1.1.1.1:1 weight=1",
    ),
    (
        Format::GoFrame,
        "/s/d/d/n/latest/1.1.1.1:1",
        r#"{"insecure":true}"#,
        "1.1.1.1:1 weight=1",
    ),
    (
        Format::AddressInKey,
        "test/1.1.1.1:1",
        "whatever",
        "1.1.1.1:1 weight=1",
    ),
];

#[test]
fn malformed_values_are_errors() {
    use Format::*;
    for (format, key, value) in [
        (EtcdNaming, "s/a", ""),
        (EtcdNaming, "s/a", "{}"),
        (EtcdNaming, "s/a", "[]"),
        (EtcdNaming, "s/a", r#"{"Addr":""}"#),
        (EtcdNaming, "s/a", r#"{"Addr":7}"#),
        (Plain, "s/a", ""),
        (Plain, "s/a", "http://1.1.1.1:1"),
        (Url, "s/a", "1.1.1.1:1"),
        (Url, "s/a", "ftp://1.1.1.1:1"),
        (Url, "s/a", "grpc://1.1.1.1"),
        (Url, "s/a", "http://user:secret@1.1.1.1:1"),
        (GoZero, "k/1", ""),
        (Kratos, "/m/s/i", "null"),
        (Kratos, "/m/s/i", r#"{"name":"s","endpoints":null}"#),
        (Kratos, "/m/s/i", r#"{"name":"s","endpoints":[]}"#),
        (Kratos, "/m/s/i", r#"{"name":"s","endpoints":["grpc://"]}"#),
        (Kitex, "k/s/a", r#"{"address":null}"#),
        (GoMicro, "/m/s/i", r#"{"nodes":null}"#),
        (GoMicro, "/m/s/i", r#"{"nodes":[]}"#),
        (GoMicro, "/m/s/i", r#"{"nodes":[{"id":"i"}]}"#),
        (Rpcx, "/b/s/tcp@nowhere", ""),
        (
            DubboInterface,
            "/d/s/providers/tri%3A%2F%2Fu%3Ap%401.1.1.1%3A1",
            "",
        ),
        (DubboApplication, "/s/a/i", r#"{"Host":"1.1.1.1"}"#),
        (DubboApplication, "/s/a/i", r#"{"Port":1}"#),
        (GoFrame, "/s/d/d/n/latest/x", "{}"),
        (GoFrame, "/s/d/d/n/latest/1.1.1.1:1", "[]"),
        (AddressInKey, "test/x", ""),
        (AddressInKey, "test/0.0.0.0:1", ""),
        (Mixed, "test/x", "y"),
    ] {
        assert!(
            read(&format, key, value).is_err(),
            "{format:?} {key} {value}"
        );
    }
}

#[test]
fn several_formats_under_one_prefix_are_distinguished() {
    for format in written() {
        for Golden {
            key,
            value,
            read: expected,
        } in golden(&format)
        {
            // A kratos value with the name of another service is left out, because `Mixed` does not compare the name. A value of the plain
            // format can also be read as a go-zero value, with the same result.
            let named_otherwise = value.contains("helloworld-admin");
            let read = read(&Format::Mixed, &key, &value);
            if !named_otherwise {
                assert_eq!(read.as_deref(), Ok(&*expected), "{format:?} {key} {value}");
            }
        }
    }
    let refused = Format::Mixed.encode("s/a", &Instance::new("1.1.1.1:1".parse().unwrap()));
    assert!(refused.unwrap_err().to_string().contains("for reading"));
}

/// Returns the attributes that a format can store, and whether it can store metadata.
fn room(format: &Format) -> (&'static [&'static str], bool) {
    match format {
        Format::Plain | Format::GoZero | Format::AddressInKey => (&[], false),
        Format::Url => (&["tls"], false),
        Format::Kratos | Format::GoFrame => (&["weight", "zone", "version", "tls"], true),
        _ => (&["weight", "zone", "version"], true),
    }
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z]{1,8}", "[ -~]{1,12}", "\\PC{1,6}"]
        // In some formats, the version `latest` means that there is no version.
        .prop_filter("not `latest`", |text| text != "latest")
}

fn address() -> impl Strategy<Value = String> {
    prop_oneof![
        (1_u8..=223, any::<u8>(), any::<u8>(), 1_u16..)
            .prop_filter("no link-local address", |(a, b, ..)| (*a, *b) != (169, 254))
            .prop_map(|(a, b, c, port)| format!("{a}.{b}.{c}.1:{port}")),
        (1_u16.., 1_u16..).prop_map(|(a, port)| format!("[2001:db8::{a:x}]:{port}")),
        ("[a-z]{1,8}(\\.[a-z]{2,5}){0,2}", 1_u16..)
            .prop_filter("no Unix socket", |(name, _)| name != "unix")
            .prop_map(|(name, port)| format!("{name}:{port}")),
    ]
}

prop_compose! {
    fn instance(format: Format)(
        address in address(),
        weight in 1_u32..=1_000_000,
        zone in proptest::option::of(text()),
        version in proptest::option::of(text()),
        tls in any::<bool>(),
        metadata in proptest::collection::btree_map(text(), text(), 0..4),
    ) -> Instance {
        let (attributes, map) = room(&format);
        let mut instance = Instance::new(address.parse().unwrap());
        if attributes.contains(&"weight") {
            instance = instance.with_weight(weight);
        }
        if let Some(zone) = zone.filter(|_| attributes.contains(&"zone")) {
            instance = instance.with_zone(zone);
        }
        // GoFrame stores the version as one segment of the key, so the version cannot contain a slash.
        let in_key = |version: &String| format != Format::GoFrame || !version.contains('/');
        if let Some(version) = version.filter(in_key).filter(|_| attributes.contains(&"version")) {
            instance = instance.with_version(version);
        }
        instance = instance.with_tls(tls && attributes.contains(&"tls"));
        let reserved = ["weight", "zone", "version", "leaving", "protocol", "insecure", "interface", "state"];
        for (name, value) in metadata {
            if map && !reserved.contains(&&*name) {
                instance = instance.with_metadata(name, value);
            }
        }
        instance
    }
}

/// Writes random instances, reads them, and checks that they are unchanged. Prints the seed, so that a failure can be reproduced.
fn property(name: &str, format: &Format, cases: u32) {
    let seed: u64 = std::env::var("FORMATS_SEED")
        .map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
    eprintln!("{name} {format:?}: FORMATS_SEED={seed}");
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = proptest::test_runner::TestRng::from_seed(
        proptest::test_runner::RngAlgorithm::ChaCha,
        &bytes,
    );
    let config = ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let mut runner = proptest::test_runner::TestRunner::new_with_rng(config, rng);
    let outcome = runner.run(&(instance(format.clone()), text()), |(instance, prefix)| {
        let prefix = format!("/{prefix}/");
        let base = [None, Some(""), Some("/base"), Some(&*prefix)];
        for base in base {
            let key = format.key(base, "helloworld.Greeter", &instance).unwrap();
            prop_assert!(
                key.starts_with(&format.service_prefix(base, "helloworld.Greeter")),
                "{key}"
            );
            let value = format.encode(&key, &instance);
            prop_assert!(value.is_ok(), "{value:?}");
            let value = value.unwrap();
            let read = format.decode(&key, &value, &AddressPolicy::default());
            prop_assert_eq!(
                summary(read.clone().unwrap().as_ref()),
                summary(Some(&instance)),
                "{} {}",
                key,
                String::from_utf8_lossy(&value)
            );
            prop_assert_eq!(read, Ok(Some(instance.clone())));
        }
        Ok(())
    });
    outcome.unwrap_or_else(|failure| panic!("{format:?} {failure}"));
}

#[test]
fn writing_then_reading_any_instance_gives_it_back() {
    for format in written() {
        property("writing then reading", &format, 200);
    }
}

#[test]
fn fields_that_a_format_cannot_store_are_named_in_the_error() {
    let instance = || Instance::new("10.0.0.5:80".parse().unwrap());
    for (format, instance, word) in [
        (Format::Plain, instance().with_weight(2), "weight 2"),
        (Format::GoZero, instance().with_zone("a"), "zone"),
        (
            Format::AddressInKey,
            instance().with_version("1"),
            "version",
        ),
        (
            Format::Url,
            instance().with_metadata("rack", "7"),
            "\"rack\"",
        ),
        (Format::EtcdNaming, instance().with_tls(true), "TLS"),
        (
            Format::EtcdNaming,
            instance().with_metadata("weight", "7"),
            "weight",
        ),
        (
            Format::GoMicro,
            instance().with_metadata("protocol", "http"),
            "address",
        ),
        (
            Format::GoMicro,
            instance().with_version("latest"),
            "version",
        ),
        (
            Format::Rpcx,
            instance().with_metadata("state", "inactive"),
            "address",
        ),
    ] {
        let key = format.key(None, "s", &instance).unwrap();
        let error = format.encode(&key, &instance).unwrap_err().to_string();
        assert!(error.contains(word), "{format:?} {error}");
    }
    // The address in the key differs from the address of the instance.
    let error = Format::AddressInKey.encode("s/10.0.0.6:80", &instance());
    assert!(error.unwrap_err().to_string().contains("address"));
    let long = instance().with_metadata("a", "x".repeat(70_000));
    let error = Format::EtcdNaming
        .encode("s/a", &long)
        .unwrap_err()
        .to_string();
    assert!(error.contains("limit"), "{error}");
}

/// A custom format that panics for the value `panic`. It decodes every other value to an instance with an unspecified address and a weight
/// above the limit.
#[derive(Debug)]
struct Loud;

impl InstanceFormat for Loud {
    fn name(&self) -> &'static str {
        "Loud"
    }

    fn encode(&self, _: &str, _: &Instance) -> Result<Vec<u8>, FormatError> {
        Ok(Vec::new())
    }

    fn decode(&self, _: &str, value: &[u8]) -> Result<Option<Instance>, FormatError> {
        assert!(value != b"panic", "deliberate panic");
        Ok(Some(
            Instance::new("0.0.0.0:1".parse().unwrap()).with_weight(u32::MAX),
        ))
    }
}

#[test]
fn a_panic_in_a_custom_format_is_an_error_and_the_address_policy_still_applies() {
    let format = Format::custom(Loud);
    let read = |value: &[u8]| format.decode("s/a", value, &AddressPolicy::default());
    assert!(read(b"panic").unwrap_err().to_string().contains("panic"));
    assert!(read(b"").unwrap_err().to_string().contains("unspecified"));
    assert!(
        read(&vec![0; 70_000])
            .unwrap_err()
            .to_string()
            .contains("65536 bytes")
    );
    assert_eq!(format, format);
    assert_ne!(format, Format::Plain);
}

/// Values of up to 64 KiB that are expensive to parse. A hostile writer could put them into etcd.
fn hostile() -> Vec<String> {
    let size = 64 * 1024;
    let fill = |part: &str, close: &str| {
        let mut text = part.repeat((size - close.len() - 16) / part.len());
        text.push_str(close);
        text
    };
    vec![
        "[".repeat(size),
        "{\"a\":".repeat(size / 5),
        format!("{{{}}}", fill("\"a\":1,", "\"Addr\":\"1.1.1.1:1\"")),
        format!(
            "{{\"Addr\":\"1.1.1.1:1\",\"Metadata\":{{{}}}}}",
            fill("\"\\u0000\":[],", "\"b\":0")
                .split_at(40_000)
                .0
                .to_owned()
                + "\"b\":0"
        ),
        format!(
            "{{\"endpoints\":[{}]}}",
            fill("\"grpc://\",", "\"grpc://1.1.1.1:1\"")
                .split_at(60_000)
                .0
                .to_owned()
                + "\"grpc://1.1.1.1:1\""
        ),
        format!("{{\"nodes\":[{}]}}", fill("{},", "{}")),
        fill("a=b&", "a=b"),
        fill("%3A%2F%2F", ""),
        fill("1.1.1.1:1,", "1.1.1.1:1"),
        (0..9_000).fold(
            String::from("{\"Addr\":\"1.1.1.1:1\""),
            |mut text, index| {
                if text.len() < size - 20 {
                    write!(text, ",\"{index:x}\":0").unwrap();
                }
                text
            },
        ) + "}",
        "http://".to_owned() + &fill("a.", "a:1"),
        "\u{0}".repeat(size),
    ]
}

#[test]
fn the_largest_values_are_decoded_in_limited_time_and_memory() {
    let peak = || {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok())
            .unwrap_or(0)
    };
    let before = peak();
    let policy = AddressPolicy::default();
    for format in FORMATS {
        for value in hostile() {
            for (key, value) in [
                ("s/providers/1.1.1.1:1", &*value),
                (&*value, "weight=1"),
                (&*format!("s/providers/{value}"), ""),
            ] {
                let took = |_| {
                    let start = Instant::now();
                    drop(format.decode(key, value.as_bytes(), &policy));
                    Instant::now().saturating_duration_since(start)
                };
                // 500 ms are enough for a debug build and for tests that run in parallel. A quadratic parser would take seconds in every
                // attempt.
                let enough = Duration::from_millis(500);
                assert!(
                    (0..5).map(took).any(|took| took < enough),
                    "{format:?} is too slow for {}...",
                    &key[..20.min(key.len())]
                );
            }
        }
    }
    let grown = peak().saturating_sub(before);
    assert!(grown < 128 * 1024, "the process grew by {grown} KiB");
}

/// Returns a key or a value with random mutations.
fn mutated(rng: &mut fastrand::Rng, text: &str, other: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    for _ in 0..rng.usize(0..4) {
        let at = rng.usize(0..=bytes.len());
        let end = rng.usize(at..=bytes.len().min(at + 12));
        match rng.u8(0..6) {
            0 => bytes.truncate(at),
            1 => drop(bytes.splice(at..end, [])),
            2 => drop(bytes.splice(at..at, [rng.u8(..)])),
            3 => {
                let from = rng.usize(0..=other.len());
                let piece = &other.as_bytes()[from..other.len().min(from + 16)];
                drop(bytes.splice(at..end, piece.iter().copied()));
            }
            4 => {
                let piece = bytes[at..end].to_vec();
                drop(bytes.splice(at..at, piece));
            }
            _ => {
                let words = [
                    "null",
                    "{}",
                    "[]",
                    "\"\"",
                    "-1",
                    "1e999",
                    ":",
                    "/",
                    "@",
                    ",",
                    "%",
                    "%2F",
                    "+",
                    "&",
                    "=",
                    "://",
                    "0.0.0.0:1",
                    "169.254.169.254:80",
                    "[::]:1",
                    "[fe80::1]:1",
                    "127.0.0.1:1",
                    "10.0.0.9:9",
                    "\\u0000",
                ];
                drop(bytes.splice(at..end, words[rng.usize(0..words.len())].bytes()));
            }
        }
    }
    bytes
}

/// Runs the check of the fuzz targets on nearly valid keys and values. The environment variable `FORMATS_SEED` repeats a run, and
/// `FORMATS_RUNS` sets the number of keys and values.
#[test]
fn mutated_values_never_break_the_decoders() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().unwrap());
    let seed = number("FORMATS_SEED").unwrap_or_else(|| fastrand::u64(..));
    eprintln!("FORMATS_SEED={seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let seeds: Vec<_> = written().flat_map(|format| golden(&format)).collect();
    for _ in 0..number("FORMATS_RUNS").unwrap_or(4_000) {
        let one = &seeds[rng.usize(0..seeds.len())];
        let other = &seeds[rng.usize(0..seeds.len())];
        let key = mutated(&mut rng, &one.key, &other.key);
        let value = mutated(&mut rng, &one.value, &other.value);
        for format in &FORMATS {
            check(format, &String::from_utf8_lossy(&key), &value);
        }
    }
}

#[tokio::test]
async fn servers_are_registered_and_found_at_the_keys_of_the_format() {
    let etcd = etcd().await;
    let registry = Registry::connect(etcd.endpoints()).await.unwrap();
    let by_hand = client(&etcd).await;
    for (format, key) in [
        (Format::EtcdNaming, "/gRPC/greeter/10.0.0.5:80"),
        (Format::Plain, "/gRPC/greeter/10.0.0.5:80"),
        (Format::Url, "/gRPC/greeter/10.0.0.5:80"),
        (Format::GoZero, "greeter/10.0.0.5:80"),
        (Format::Kratos, "/microservices/greeter/10.0.0.5:80"),
        (Format::Kitex, "kitex/registry-etcd/greeter/10.0.0.5:80"),
        (Format::GoMicro, "/micro/registry/greeter/10.0.0.5:80"),
        (Format::Rpcx, "/rpcx_test/greeter/tcp@10.0.0.5:80"),
        (
            Format::DubboInterface,
            "/dubbo/greeter/providers/tri%3A%2F%2F10.0.0.5%3A80%2Fgreeter%3Finterface%3Dgreeter",
        ),
        (Format::DubboApplication, "/services/greeter/10.0.0.5:80"),
        (
            Format::GoFrame,
            "/service/default/default/greeter/latest/10.0.0.5:80",
        ),
        (Format::AddressInKey, "greeter/10.0.0.5:80"),
        (Format::custom(Semicolon), "/custom/greeter/10.0.0.5:80"),
    ] {
        let registration = registry
            .registration("greeter")
            .address("10.0.0.5:80")
            .format(format.clone());
        let registration = registration.register().await.unwrap();
        assert_eq!(registration.key(), key, "{format:?}");
        let resolver = registry.resolver("greeter").format(format.clone()).start();
        knows(&resolver, &["10.0.0.5:80"]).await;
        // Formats differ in the weight of a value that contains no weight.
        let weight = resolver.instances()[0].weight();
        match registration.set_weight(weight + 1).await {
            Ok(()) => {
                eventually("the weight changes in place", async || {
                    resolver.instances()[0].weight() == weight + 1
                })
                .await;
            }
            Err(error) => {
                let error = error.to_string();
                assert!(error.contains("cannot represent the weight"), "{error}");
            }
        }
        registration.deregister().await.unwrap();
        knows(&resolver, &[]).await;
        assert_eq!(resolver.status().rejected_values, 0);
        assert!(list(&by_hand, &key[..1]).await.is_empty());
    }
}

/// A custom format, `host:port;weight`, with its own default prefix.
#[derive(Debug)]
struct Semicolon;

impl InstanceFormat for Semicolon {
    fn name(&self) -> &'static str {
        "Semicolon"
    }

    fn default_prefix(&self) -> &'static str {
        "/custom/"
    }

    fn encode(&self, _: &str, instance: &Instance) -> Result<Vec<u8>, FormatError> {
        Ok(format!("{};{}", instance.address(), instance.weight()).into_bytes())
    }

    fn decode(&self, _: &str, value: &[u8]) -> Result<Option<Instance>, FormatError> {
        let text = String::from_utf8_lossy(value);
        let (address, weight) = text
            .split_once(';')
            .ok_or(FormatError::new("has no semicolon"))?;
        let address = address
            .parse()
            .map_err(|_| FormatError::new("has no address"))?;
        let weight = weight
            .parse()
            .map_err(|_| FormatError::new("has no weight"))?;
        Ok(Some(Instance::new(address).with_weight(weight)))
    }
}

#[tokio::test]
async fn fields_that_a_format_cannot_store_are_rejected_before_any_write() {
    let etcd = etcd().await;
    let registry = Registry::connect(etcd.endpoints()).await.unwrap();
    let registration = || registry.registration("greeter").address("10.0.0.5:80");
    for (registration, word) in [
        (registration().format(Format::Plain).zone("a"), "zone"),
        (
            registration().format(Format::GoZero).metadata("a", "b"),
            "\"a\"",
        ),
        (
            registration().format(Format::EtcdNaming).tls_hint(true),
            "TLS",
        ),
        (
            registration()
                .format(Format::AddressInKey)
                .instance_id("node1"),
            "instance id",
        ),
        (
            registration().format(Format::Rpcx).instance_id("node1"),
            "instance id",
        ),
        (
            registration().format(Format::GoFrame).version("a/b"),
            "version",
        ),
        (registration().format(Format::Mixed), "for reading"),
        (registration().format(Format::custom(Loud)), "address"),
        (
            registry
                .registration_at("/x/10.0.0.6:80")
                .address("10.0.0.5:80")
                .format(Format::AddressInKey),
            "address",
        ),
    ] {
        let error = registration.register().await.unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
    for prefix in ["/", "g", "1"] {
        assert!(list(&client(&etcd).await, prefix).await.is_empty());
    }
    let hinted = registration()
        .format(Format::Kratos)
        .tls_hint(true)
        .version("v1")
        .instance_id("7");
    let hinted = hinted.register().await.unwrap();
    let (key, value, _) = list(&client(&etcd).await, "/micro").await.remove(0);
    assert_eq!(key, "/microservices/greeter/7");
    assert_eq!(
        value,
        r#"{"id":"7","name":"greeter","version":"v1","metadata":null,"endpoints":["grpcs://10.0.0.5:80"]}"#
    );
    hinted.deregister().await.unwrap();
}

#[tokio::test]
async fn a_prefix_replaces_the_default_of_the_format_and_can_be_empty() {
    let etcd = etcd().await;
    for (prefix, key) in [
        ("team/blue", "team/blue/greeter/10.0.0.5:80"),
        ("", "greeter/10.0.0.5:80"),
    ] {
        let registry = Registry::builder(etcd.endpoints())
            .prefix(prefix)
            .connect()
            .await
            .unwrap();
        for format in [Format::EtcdNaming, Format::Kitex] {
            let registration = registry
                .registration("greeter")
                .address("10.0.0.5:80")
                .format(format);
            let registration = registration.register().await.unwrap();
            assert_eq!(registration.key(), key);
            knows(&registry.resolver("greeter").start(), &["10.0.0.5:80"]).await;
            registration.deregister().await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_prefix_with_mixed_formats_is_read_completely() {
    let etcd = etcd().await;
    let mut by_hand = client(&etcd).await;
    let mut expected = Vec::new();
    for format in written() {
        for (index, Golden { key, value, read }) in golden(&format).into_iter().enumerate() {
            if value.contains("helloworld-admin") {
                continue;
            }
            by_hand
                .put(format!("/mixed/{format:?}{index}/{key}"), value, None)
                .await
                .unwrap();
            expected.extend(
                read.split(' ')
                    .next()
                    .filter(|address| *address != "-")
                    .map(str::to_owned),
            );
        }
    }
    expected.sort();
    expected.dedup();
    let registry = Registry::connect(etcd.endpoints()).await.unwrap();
    let resolver = registry
        .resolver_at(["/mixed/"])
        .format(Format::Mixed)
        .start();
    knows(
        &resolver,
        &expected.iter().map(String::as_str).collect::<Vec<_>>(),
    )
    .await;
    assert_eq!(resolver.status().rejected_values, 0);
}

#[tokio::test]
async fn go_zero_targets_find_go_zero_servers() {
    let etcd = etcd().await;
    let (address, server) = support::greeter("alpha").await;
    let key = "team/user.rpc/7587870460981677828";
    let mut by_hand = client(&etcd).await;
    by_hand.put(key, address.to_string(), None).await.unwrap();
    let members = etcd.endpoints().join(",");
    let members = members.replace("http://", "");
    for target in [
        format!("discov://{members}/team/user.rpc"),
        format!("etcd:///{members}?key=team%2Fuser.rpc"),
    ] {
        let channel = tonic_etcd::connect(&target).await.unwrap();
        assert_eq!(
            channel.endpoints()[0].address.to_string(),
            address.to_string()
        );
    }
    let error = tonic_etcd::connect("etcd:///user.rpc").await.unwrap_err();
    assert!(error.to_string().contains("channel_to"), "{error}");
    server.abort();
}
