use super::*;
use crate::instance::Advertisement;
use tonic_balance::AddressPolicy;

fn read(value: &str) -> Result<Advertisement, FormatError> {
    Decoder::default().decode(value.as_bytes())
}

#[test]
fn every_format_with_the_address_in_the_value_is_recognised() {
    for value in [
        "10.0.0.5:8080",
        "10.0.0.5:8080\n",
        "http://10.0.0.5:8080",
        "grpc://10.0.0.5:8080/path?query",
        r#"{"Op":0,"Addr":"10.0.0.5:8080","Metadata":null}"#,
        r#"{"Addr":"10.0.0.5:8080","Metadata":"..."}"#,
        r#"{"addr":"10.0.0.5:8080"}"#,
        r#"{"network":"tcp","address":"10.0.0.5:8080","weight":10,"tags":null}"#,
        r#"{"id":"6f1d","name":"helloworld","version":"v1.0.0","metadata":null,"endpoints":["http://10.0.0.5:1","grpc://10.0.0.5:8080"]}"#,
        r#"{"name":"greeter","metadata":null,"endpoints":[],"nodes":[{"metadata":{"protocol":"grpc"},"id":"x","address":"10.0.0.5:8080"}]}"#,
        "{\"ID\":\"x\",\"Host\":\"10.0.0.5\",\"Port\":8080,\"Weight\":0,\"Metadata\":{},\"ServiceMetadata\":null,\"Address\":\"\"}\n",
    ] {
        let advertisement = read(value).unwrap_or_else(|error| panic!("{value} {error}"));
        assert_eq!(advertisement.address.as_str(), "10.0.0.5:8080", "{value}");
        let format = Format::recognise(value.as_bytes()).expect("the format is recognised");
        // kratos and go-micro ignore a value whose name is not in the key.
        let key = match format {
            Format::Kratos => "/microservices/helloworld/6f1d",
            Format::GoMicro => "/micro/registry/greeter/x",
            _ => "",
        };
        let advertisement = Decoder::default().read(key, value.as_bytes());
        let advertisement = advertisement.expect("a resolver without a format reads the value");
        let decoded = format.decode(key, value.as_bytes(), &AddressPolicy::default());
        let decoded = decoded.expect("the recognised format reads the value");
        assert_eq!(
            decoded.as_ref().map(crate::Instance::advertisement),
            advertisement.as_ref().map(crate::Instance::advertisement),
            "{format} reads {value} as a resolver without a format does"
        );
    }
}

#[test]
fn attributes_are_read_from_metadata_and_from_fields() {
    let naming = r#"{"Op":0,"Addr":"10.0.0.5:80","Metadata":{"weight":3,"zone":"eu-1a","version":"1.2.0","rack":"7","nested":{"a":[1]}}}"#;
    let read_naming = read(naming).expect("the value of etcd naming is valid");
    assert_eq!(
        (
            read_naming.weight,
            read_naming.zone.as_deref(),
            read_naming.version.as_deref()
        ),
        (3, Some("eu-1a"), Some("1.2.0"))
    );
    assert_eq!(read_naming.metadata["rack"], "7");
    assert_eq!(read_naming.metadata["nested"], r#"{"a":[1]}"#);
    let kratos =
        r#"{"version":"v1","metadata":{"weight":"20"},"endpoints":["grpc://10.0.0.5:80"]}"#;
    let read_kratos = read(kratos).expect("the value of kratos is valid");
    assert_eq!(
        (read_kratos.weight, read_kratos.version.as_deref()),
        (20, Some("v1"))
    );
    assert_eq!(
        read(r#"{"address":"10.0.0.5:80","weight":-4}"#)
            .expect("a value with a weight below 1 is read")
            .weight,
        10,
        "kitex' default weight must replace a weight below 1"
    );
    assert_eq!(
        read(r#"{"address":"10.0.0.5:80","weight":1e300}"#)
            .expect("a value with a weight above the limit is read")
            .weight,
        MAX_WEIGHT
    );
}

#[test]
fn invalid_values_cause_an_error_and_no_panic() {
    let deep = "[".repeat(30_000);
    let deep_object = "{\"a\":".repeat(10_000);
    let long = "x".repeat(MAX_VALUE + 1);
    for value in [
        "",
        " ",
        "{",
        "{}",
        "null",
        "[]",
        "\"10.0.0.5:80\"",
        "{\"Addr\":1}",
        "{\"Addr\":\"\"}",
        "{\"address\":null}",
        "not an address",
        "ftp://10.0.0.5:80",
        "http://user:pw@10.0.0.5:80",
        "http://",
        "grpc://10.0.0.5",
        "0.0.0.0:80",
        "169.254.169.254:80",
        &deep,
        &deep_object,
        &long,
    ] {
        let error = read(value).expect_err("an invalid value must cause an error");
        assert!(
            error.to_string().len() < 200,
            "the error must have fewer than 200 bytes, so that it cannot repeat a long value"
        );
        assert!(!error.to_string().contains("user:pw"), "{error}");
    }
    assert!(Decoder::default().decode(b"\xff\xfe").is_err());
}

#[test]
fn a_reader_with_a_fixed_format_rejects_other_formats() {
    let only = Decoder {
        format: Some(Format::Plain),
        ..Decoder::default()
    };
    assert!(only.decode(b"10.0.0.5:80").is_ok());
    assert!(only.decode(br#"{"Op":0,"Addr":"10.0.0.5:80"}"#).is_err());
    assert!(only.decode(b"http://10.0.0.5:80").is_err());
}
