//! grpc-go's parser and ours accept the same service configs, except for the differences in [`DIFFERENT`].

use serde_json::{Value, json};
use tonic_etcd::channel::ServiceConfig;

use crate::peer::{Go, go};

/// Documents that both parsers accept.
const ACCEPTED: &[&str] = &[
    "{}",
    " {\n} ",
    "null",
    r#"{"unknown": 1, "methodConfig": []}"#,
    r#"{"methodConfig": null, "retryThrottling": null, "healthCheckConfig": null, "loadBalancingConfig": null}"#,
    r#"{"methodConfig": [null, {}, {"name": null}, {"name": []}]}"#,
    r#"{"methodConfig": [{"name": [{}]}]}"#,
    r#"{"methodConfig": [{"name": [null]}]}"#,
    r#"{"methodConfig": [{"name": [{"service": null, "method": null}]}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}, {"service": "a", "method": "b"}, {"method": ""}]}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a/b"}, {"service": "a", "method": "b"}]}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "timeout": "1s"}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "timeout": "0s"}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "timeout": ".000000001s"}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "timeout": "1.s"}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "timeout": "315576000000.999999999s"}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "TIMEOUT": "1s", "waitforready": true}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "waitForReady": null, "timeout": null, "retryPolicy": null}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "maxRequestMessageBytes": 0, "maxResponseMessageBytes": 9223372036854775807}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "retryPolicy": {"maxAttempts": 2, "initialBackoff": "0.1s", "maxBackoff": "1s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"]}}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "retryPolicy": {"maxAttempts": 99, "initialBackoff": "1s", "maxBackoff": "0.5s", "backoffMultiplier": 0.1, "retryableStatusCodes": [0, 16, "OK", "CANCELLED", null]}}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "retryPolicy": {"maxAttempts": 2, "initialBackoff": "0.1s", "maxBackoff": "1s", "backoffMultiplier": 2e3, "retryableStatusCodes": ["UNAVAILABLE", "UNAVAILABLE"], "perAttemptRecvTimeout": "1s"}}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "hedgingPolicy": {"maxAttempts": 2, "hedgingDelay": "0.5s", "nonFatalStatusCodes": ["INTERNAL"]}}]}"#,
    r#"{"retryThrottling": {"maxTokens": 1000, "tokenRatio": 0.1}}"#,
    r#"{"retryThrottling": {"maxTokens": 0.5, "tokenRatio": 7}}"#,
    r#"{"healthCheckConfig": {}}"#,
    r#"{"healthCheckConfig": {"serviceName": "a"}}"#,
    r#"{"healthCheckConfig": {"serviceName": ""}}"#,
    r#"{"loadBalancingConfig": [{"round_robin": {}}]}"#,
    r#"{"loadBalancingConfig": [{"weighted_round_robin": {}}]}"#,
    r#"{"loadBalancingConfig": [{"weighted_round_robin": {"enableOobLoadReport": true, "oobReportingPeriod": "10s", "blackoutPeriod": "1s", "weightExpirationPeriod": "180s", "weightUpdatePeriod": "0.5s", "errorUtilizationPenalty": 0.5}}]}"#,
    r#"{"loadBalancingConfig": [{"round_robin": 7}]}"#,
    r#"{"loadBalancingConfig": [{"unheard_of": [1]}, {"round_robin": {"a": 1}}, {"a": 1, "b": 2}]}"#,
    r#"{"loadBalancingConfig": [{"round_robin": {}}, {}, null]}"#,
    r#"{"loadBalancingConfig": [{"least_request_experimental": {}}]}"#,
    r#"{"loadBalancingConfig": [{"least_request_experimental": null}]}"#,
    r#"{"loadBalancingConfig": [{"least_request_experimental": {"choiceCount": 2}}]}"#,
    r#"{"loadBalancingConfig": [{"least_request_experimental": {"choiceCount": 4294967295}}]}"#,
    r#"{"loadBalancingConfig": [{"random_subsetting_experimental": {"subsetSize": 1, "childPolicy": [{"round_robin": {}}]}}]}"#,
    r#"{"loadBalancingConfig": [{"random_subsetting_experimental": {"SUBSETSIZE": 4294967295, "childPolicy": [{"unheard_of": {}}, {"least_request_experimental": {}}], "a": 1}}]}"#,
    r#"{"loadBalancingConfig": [{"random_subsetting_experimental": {"subsetSize": 20, "childPolicy": [{"random_subsetting_experimental": {"subsetSize": 5, "childPolicy": [{"round_robin": {}}]}}]}}]}"#,
    r#"{"loadBalancingConfig": [{"ring_hash_experimental": {}}]}"#,
    r#"{"loadBalancingConfig": [{"ring_hash_experimental": null}]}"#,
    r#"{"loadBalancingConfig": [{"ring_hash_experimental": {"minRingSize": 0, "maxRingSize": 8388608}}]}"#,
    r#"{"loadBalancingConfig": [{"ring_hash_experimental": {"minRingSize": 5, "maxRingSize": 5, "requestHashHeader": "X-Key"}}]}"#,
    r#"{"loadBalancingConfig": [{"ring_hash_experimental": {"requestHashHeader": ""}}]}"#,
    r#"{"loadBalancingConfig": [{"ring_hash_experimental": {"requestHashHeader": null, "MINRINGSIZE": null}}]}"#,
    r#"{"loadBalancingPolicy": "round_robin"}"#,
    r#"{"loadBalancingPolicy": "unheard_of"}"#,
];

/// Documents that both parsers reject.
const REJECTED: &[&str] = &[
    r#"{"loadBalancingConfig": [{"weighted_round_robin": {"errorUtilizationPenalty": -1}}]}"#,
    r#"{"loadBalancingConfig": [{"weighted_round_robin": {"blackoutPeriod": "soon"}}]}"#,
    r#"{"loadBalancingConfig": [{"weighted_round_robin": {"weightUpdatePeriod": 1}}]}"#,
    "",
    " ",
    "{",
    "{} {}",
    "[]",
    "7",
    r#""round_robin""#,
    "{'methodConfig': []}",
    r#"{"methodConfig": {}}"#,
    r#"{"methodConfig": [7]}"#,
    r#"{"methodConfig": [{"name": {}}]}"#,
    r#"{"methodConfig": [{"name": ["a"]}]}"#,
    r#"{"methodConfig": [{"name": [{"service": 7}]}]}"#,
    r#"{"methodConfig": [{"name": [{"method": "b"}]}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}, {"service": "a"}]}]}"#,
    r#"{"methodConfig": [{"name": [{}]}, {"name": [{"service": "", "method": ""}]}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a", "method": "b"}]}, {"name": [{"service": "a", "method": "b"}]}]}"#,
    r#"{"methodConfig": [{"timeout": "1"}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "timeout": 1}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "timeout": "1m"}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "timeout": "1.5.5s"}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "timeout": "0.1234567890s"}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "timeout": "315576000001s"}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "timeout": "s"}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "timeout": "1e3s"}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "waitForReady": "true"}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "waitForReady": 1}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "maxRequestMessageBytes": 1.0}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "maxRequestMessageBytes": "1"}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "maxRequestMessageBytes": 1e3}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "maxResponseMessageBytes": 9223372036854775808}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "retryPolicy": {}}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "retryPolicy": []}]}"#,
    r#"{"methodConfig": [{"name": [], "retryPolicy": {"maxAttempts": 1, "initialBackoff": "1s", "maxBackoff": "1s", "backoffMultiplier": 1, "retryableStatusCodes": [14]}}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "retryPolicy": {"maxAttempts": "2", "initialBackoff": "1s", "maxBackoff": "1s", "backoffMultiplier": 1, "retryableStatusCodes": [14]}}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "retryPolicy": {"maxAttempts": 2.5, "initialBackoff": "1s", "maxBackoff": "1s", "backoffMultiplier": 1, "retryableStatusCodes": [14]}}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "retryPolicy": {"maxAttempts": 2, "initialBackoff": "0s", "maxBackoff": "1s", "backoffMultiplier": 1, "retryableStatusCodes": [14]}}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "retryPolicy": {"maxAttempts": 2, "initialBackoff": "1s", "backoffMultiplier": 1, "retryableStatusCodes": [14]}}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "retryPolicy": {"maxAttempts": 2, "initialBackoff": "1s", "maxBackoff": "1s", "backoffMultiplier": 0, "retryableStatusCodes": [14]}}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "retryPolicy": {"maxAttempts": 2, "initialBackoff": "1s", "maxBackoff": "1s", "backoffMultiplier": 1, "retryableStatusCodes": []}}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "retryPolicy": {"maxAttempts": 2, "initialBackoff": "1s", "maxBackoff": "1s", "backoffMultiplier": 1, "retryableStatusCodes": ["unavailable"]}}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "retryPolicy": {"maxAttempts": 2, "initialBackoff": "1s", "maxBackoff": "1s", "backoffMultiplier": 1, "retryableStatusCodes": [17]}}]}"#,
    r#"{"methodConfig": [{"name": [{"service": "a"}], "retryPolicy": {"maxAttempts": 2, "initialBackoff": "1s", "maxBackoff": "1s", "backoffMultiplier": 1, "retryableStatusCodes": ["CANCELED"]}}]}"#,
    r#"{"methodConfig": [], "retryThrottling": {}}"#,
    r#"{"methodConfig": [], "retryThrottling": {"maxTokens": 10}}"#,
    r#"{"methodConfig": [], "retryThrottling": {"maxTokens": 0, "tokenRatio": 1}}"#,
    r#"{"methodConfig": [], "retryThrottling": {"maxTokens": 1000.5, "tokenRatio": 1}}"#,
    r#"{"methodConfig": [], "retryThrottling": {"maxTokens": 10, "tokenRatio": 0}}"#,
    r#"{"methodConfig": [], "retryThrottling": {"maxTokens": 10, "tokenRatio": -1}}"#,
    r#"{"methodConfig": [], "retryThrottling": {"maxTokens": "10", "tokenRatio": 1}}"#,
    r#"{"healthCheckConfig": {"serviceName": 7}}"#,
    r#"{"healthCheckConfig": "a"}"#,
    r#"{"loadBalancingConfig": []}"#,
    r#"{"loadBalancingConfig": {}}"#,
    r#"{"loadBalancingConfig": [null]}"#,
    r#"{"loadBalancingConfig": [{}]}"#,
    r#"{"loadBalancingConfig": [{"unheard_of": {}}]}"#,
    r#"{"loadBalancingConfig": [{"Round_Robin": {}}]}"#,
    r#"{"loadBalancingConfig": [{"a": 1, "round_robin": {}}]}"#,
    r#"{"loadBalancingConfig": [{"round_robin": {}}, 7]}"#,
    r#"{"loadBalancingConfig": ["round_robin"]}"#,
    r#"{"loadBalancingConfig": [{"least_request_experimental": {"choiceCount": 1}}]}"#,
    r#"{"loadBalancingConfig": [{"least_request_experimental": {"choiceCount": -2}}]}"#,
    r#"{"loadBalancingConfig": [{"least_request_experimental": {"choiceCount": 4294967296}}]}"#,
    r#"{"loadBalancingConfig": [{"least_request_experimental": []}]}"#,
    r#"{"loadBalancingConfig": [{"random_subsetting_experimental": {}}]}"#,
    r#"{"loadBalancingConfig": [{"random_subsetting_experimental": null}]}"#,
    r#"{"loadBalancingConfig": [{"random_subsetting_experimental": 7}]}"#,
    r#"{"loadBalancingConfig": [{"random_subsetting_experimental": {"subsetSize": 20}}]}"#,
    r#"{"loadBalancingConfig": [{"random_subsetting_experimental": {"subsetSize": 20, "childPolicy": null}}]}"#,
    r#"{"loadBalancingConfig": [{"random_subsetting_experimental": {"subsetSize": 20, "childPolicy": []}}]}"#,
    r#"{"loadBalancingConfig": [{"random_subsetting_experimental": {"subsetSize": 20, "childPolicy": {"round_robin": {}}}}]}"#,
    r#"{"loadBalancingConfig": [{"random_subsetting_experimental": {"subsetSize": 20, "childPolicy": [{"unheard_of": {}}]}}]}"#,
    r#"{"loadBalancingConfig": [{"random_subsetting_experimental": {"subsetSize": 20, "childPolicy": [{"least_request_experimental": {"choiceCount": 1}}]}}]}"#,
    r#"{"loadBalancingConfig": [{"random_subsetting_experimental": {"childPolicy": [{"round_robin": {}}]}}]}"#,
    r#"{"loadBalancingConfig": [{"random_subsetting_experimental": {"subset_size": 20, "child_policy": [{"round_robin": {}}]}}]}"#,
    r#"{"loadBalancingConfig": [{"random_subsetting_experimental": {"subsetSize": null, "childPolicy": [{"round_robin": {}}]}}]}"#,
    r#"{"loadBalancingConfig": [{"random_subsetting_experimental": {"subsetSize": 0, "childPolicy": [{"round_robin": {}}]}}]}"#,
    r#"{"loadBalancingConfig": [{"random_subsetting_experimental": {"subsetSize": -1, "childPolicy": [{"round_robin": {}}]}}]}"#,
    r#"{"loadBalancingConfig": [{"random_subsetting_experimental": {"subsetSize": 2.5, "childPolicy": [{"round_robin": {}}]}}]}"#,
    r#"{"loadBalancingConfig": [{"random_subsetting_experimental": {"subsetSize": "20", "childPolicy": [{"round_robin": {}}]}}]}"#,
    r#"{"loadBalancingConfig": [{"random_subsetting_experimental": {"subsetSize": 4294967296, "childPolicy": [{"round_robin": {}}]}}]}"#,
    r#"{"loadBalancingConfig": [{"ring_hash_experimental": {"minRingSize": 8388609}}]}"#,
    r#"{"loadBalancingConfig": [{"ring_hash_experimental": {"minRingSize": 4097}}]}"#,
    r#"{"loadBalancingConfig": [{"ring_hash_experimental": {"maxRingSize": 1023}}]}"#,
    r#"{"loadBalancingConfig": [{"ring_hash_experimental": {"minRingSize": -1}}]}"#,
    r#"{"loadBalancingConfig": [{"ring_hash_experimental": {"minRingSize": "5"}}]}"#,
    r#"{"loadBalancingConfig": [{"ring_hash_experimental": {"minRingSize": 5.0}}]}"#,
    r#"{"loadBalancingConfig": [{"ring_hash_experimental": {"requestHashHeader": "x-key-BIN"}}]}"#,
    r#"{"loadBalancingConfig": [{"ring_hash_experimental": {"requestHashHeader": "x key"}}]}"#,
    r#"{"loadBalancingConfig": [{"ring_hash_experimental": {"requestHashHeader": 7}}]}"#,
    r#"{"loadBalancingConfig": [{"ring_hash_experimental": []}]}"#,
    r#"{"loadBalancingPolicy": 7}"#,
];

/// Documents that only one of the parsers accepts: the reason, the document, and whether ours accepts it.
const DIFFERENT: &[(&str, &str, bool)] = &[
    (
        "A negative duration has no meaning. grpc-go ignores a negative timeout.",
        r#"{"methodConfig": [{"name": [{}], "timeout": "-1s"}]}"#,
        false,
    ),
    (
        "grpc-go parses each group of digits as a number with a sign.",
        r#"{"methodConfig": [{"name": [{}], "timeout": "+1s"}]}"#,
        false,
    ),
    (
        "The limit has no sign in gRPC's definition. grpc-go would reject every message.",
        r#"{"methodConfig": [{"name": [{}], "maxRequestMessageBytes": -1}]}"#,
        false,
    ),
    (
        "grpc-go has no hedging, and does not read the field.",
        r#"{"methodConfig": [{"name": [{}], "hedgingPolicy": {"maxAttempts": 1}}]}"#,
        false,
    ),
    (
        "A method has either retries or hedging (gRFC A6).",
        r#"{"methodConfig": [{"name": [{}], "hedgingPolicy": {"maxAttempts": 2}, "retryPolicy": {"maxAttempts": 2, "initialBackoff": "1s", "maxBackoff": "1s", "backoffMultiplier": 1, "retryableStatusCodes": [14]}}]}"#,
        false,
    ),
    (
        "grpc-go checks the policy only in an entry that has names.",
        r#"{"methodConfig": [{"retryPolicy": {}}]}"#,
        false,
    ),
    (
        "grpc-go does not check retryThrottling without methodConfig.",
        r#"{"retryThrottling": {}}"#,
        false,
    ),
    (
        "This library has no policy that uses a single endpoint.",
        r#"{"loadBalancingConfig": [{"pick_first": {}}]}"#,
        false,
    ),
    (
        "The policy is one of this library.",
        r#"{"loadBalancingConfig": [{"latency_experimental": {}}]}"#,
        true,
    ),
    (
        "The policy is one of this library.",
        r#"{"loadBalancingConfig": [{"split_experimental": {"split": [{"label": {"version": "1.2"}, "weight": 5}, {"weight": 95}]}}]}"#,
        true,
    ),
    (
        "A pseudo-header is no key of a call. grpc-go finds no value for it.",
        r#"{"loadBalancingConfig": [{"ring_hash_experimental": {"requestHashHeader": ":path"}}]}"#,
        false,
    ),
    (
        "grpc-go replaces half of a surrogate pair, which is no text in Unicode.",
        r#"{"healthCheckConfig": {"serviceName": "\ud800"}}"#,
        false,
    ),
];

fn accepts(document: &str) -> bool {
    document.parse::<ServiceConfig>().is_ok()
}

/// Returns for each document whether grpc-go accepts it.
async fn accepted_by_go(go: &Go, documents: &[&str]) -> Vec<bool> {
    let input = serde_json::to_string(documents).unwrap();
    let printed = go.run_with(&["service-config"], &input).await;
    let accepted: Vec<_> = printed.lines().map(|line| line == "accepted").collect();
    assert_eq!(accepted.len(), documents.len(), "{printed}");
    accepted
}

#[tokio::test]
async fn grpc_go_accepts_the_same_service_configs() {
    let Some(go) = go().await else { return };
    for (documents, expected) in [(ACCEPTED, true), (REJECTED, false)] {
        let by_go = accepted_by_go(&go, documents).await;
        for (document, by_go) in documents.iter().zip(by_go) {
            assert_eq!(accepts(document), expected, "we: {document}");
            assert_eq!(by_go, expected, "grpc-go: {document}");
        }
    }
    let documents: Vec<_> = DIFFERENT.iter().map(|(_, document, _)| *document).collect();
    let by_go = accepted_by_go(&go, &documents).await;
    for ((reason, document, by_us), by_go) in DIFFERENT.iter().zip(by_go) {
        assert_eq!(accepts(document), *by_us, "we: {document} ({reason})");
        assert_eq!(by_go, !by_us, "grpc-go: {document} ({reason})");
    }
}

#[tokio::test]
async fn grpc_go_accepts_the_same_generated_service_configs() {
    let Some(go) = go().await else { return };
    let seed = std::env::var("SERVICE_CONFIG_SEED");
    let seed = seed.map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
    println!("SERVICE_CONFIG_SEED={seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let documents: Vec<_> = (0..3_000).map(|_| document(&mut rng).to_string()).collect();
    let documents: Vec<_> = documents.iter().map(String::as_str).collect();
    let by_go = accepted_by_go(&go, &documents).await;
    let both = by_go.iter().filter(|accepted| **accepted).count();
    assert!((300..2_700).contains(&both), "{both} of 3000 are accepted");
    for (document, by_go) in documents.iter().zip(by_go) {
        let ours = document.parse::<ServiceConfig>();
        assert_eq!(ours.is_ok(), by_go, "{document}: {ours:?}");
    }
}

/// Generates a document with the fields that both parsers read. Most values are valid, and the known differences are left out.
fn document(rng: &mut fastrand::Rng) -> Value {
    let mut fields = Vec::new();
    if rng.bool() {
        let entries: Vec<_> = (0..rng.usize(0..4)).map(|_| entry(rng)).collect();
        fields.push(("methodConfig", maybe(rng, json!(entries))));
    }
    if rng.u8(..4) == 0 {
        let tokens = one_of(
            rng,
            &[json!(10), json!(0.5), json!(1000), json!(0), json!(1001)],
        );
        let ratio = one_of(rng, &[json!(0.1), json!(1), json!(3), json!(0)]);
        let throttling = object(rng, vec![("maxTokens", tokens), ("tokenRatio", ratio)]);
        fields.push(("retryThrottling", throttling));
    }
    if rng.u8(..4) == 0 {
        let name = one_of(rng, &[json!("a"), json!(""), json!(7)]);
        fields.push((
            "healthCheckConfig",
            object(rng, vec![("serviceName", name)]),
        ));
    }
    if rng.u8(..3) == 0 {
        let policies: Vec<_> = (0..rng.usize(0..4)).map(|_| policy(rng)).collect();
        fields.push(("loadBalancingConfig", maybe(rng, json!(policies))));
    }
    let mut document = object(rng, fields);
    // Without a list of methods, grpc-go does not check the throttling.
    let is = |name: &str, wanted: &str| name.eq_ignore_ascii_case(wanted);
    if let Value::Object(fields) = &mut document
        && fields.keys().any(|name| is(name, "retryThrottling"))
    {
        fields.retain(|name, value| !is(name, "methodConfig") || value.is_array());
        if !fields.keys().any(|name| is(name, "methodConfig")) {
            fields.insert("methodConfig".to_owned(), json!([]));
        }
    }
    document
}

fn entry(rng: &mut fastrand::Rng) -> Value {
    let names: Vec<_> = (0..rng.usize(0..3)).map(|_| name(rng)).collect();
    let mut fields = vec![("name", json!(names))];
    if rng.bool() {
        fields.push(("timeout", duration(rng)));
    }
    if rng.u8(..4) == 0 {
        fields.push((
            "waitForReady",
            one_of(rng, &[json!(true), json!(false), json!(1)]),
        ));
    }
    for limit in ["maxRequestMessageBytes", "maxResponseMessageBytes"] {
        if rng.u8(..4) == 0 {
            let limits = [json!(0), json!(4_194_304), json!(1_u64 << 40), json!(2.5)];
            fields.push((limit, one_of(rng, &limits)));
        }
    }
    if rng.u8(..3) == 0 {
        let attempts = one_of(rng, &[json!(2), json!(5), json!(100), json!(1)]);
        let multipliers = [json!(2), json!(1.5), json!(0.1), json!(0)];
        let codes = [
            json!(["UNAVAILABLE"]),
            json!([14, "INTERNAL"]),
            json!([]),
            json!(["NONE"]),
        ];
        let policy = vec![
            ("maxAttempts", attempts),
            ("initialBackoff", duration(rng)),
            ("maxBackoff", duration(rng)),
            ("backoffMultiplier", one_of(rng, &multipliers)),
            ("retryableStatusCodes", one_of(rng, &codes)),
        ];
        fields.push(("retryPolicy", object(rng, policy)));
    }
    let mut entry = object(rng, fields);
    if let Value::Object(fields) = &mut entry {
        let is_named = fields
            .iter()
            .any(|(field, name)| field.eq_ignore_ascii_case("name") && !name.is_null());
        // The check of the policy in an entry without names is a known difference.
        fields.retain(|field, _| is_named || !field.eq_ignore_ascii_case("retryPolicy"));
    }
    entry
}

fn name(rng: &mut fastrand::Rng) -> Value {
    let service = one_of(rng, &[json!("a"), json!("b.B"), json!("c/d"), json!("")]);
    let method = one_of(rng, &[json!(""), json!("Get"), json!("Put")]);
    object(rng, vec![("service", service), ("method", method)])
}

fn duration(rng: &mut fastrand::Rng) -> Value {
    let durations = [
        "1s",
        "0.5s",
        "3.000000001s",
        ".25s",
        "60s",
        "0.1s",
        "1",
        "0s",
    ];
    let duration = *rng.choice(&durations).unwrap();
    maybe(rng, json!(duration))
}

fn policy(rng: &mut fastrand::Rng) -> Value {
    let name = [
        "round_robin",
        "least_request_experimental",
        "ring_hash_experimental",
        "unheard_of",
    ];
    let name = *rng.choice(&name).unwrap();
    let fields = if name == "ring_hash_experimental" {
        let header = [json!("x-key"), json!(""), json!("X.Key_1"), json!("x-bin")];
        vec![
            (
                "minRingSize",
                one_of(rng, &[json!(1), json!(0), json!(5000)]),
            ),
            (
                "maxRingSize",
                one_of(rng, &[json!(5000), json!(0), json!(-1)]),
            ),
            ("requestHashHeader", one_of(rng, &header)),
        ]
    } else {
        let count = one_of(rng, &[json!(2), json!(7), json!(1)]);
        vec![("choiceCount", count)]
    };
    let config = object(rng, fields);
    maybe(rng, json!({ name: config }))
}

/// Returns one of the values. The last one, which is usually not valid, is rare.
fn one_of(rng: &mut fastrand::Rng, values: &[Value]) -> Value {
    let last = values.len() - 1;
    let index = if rng.u8(..12) == 0 {
        last
    } else {
        rng.usize(..last)
    };
    values[index].clone()
}

/// Returns the value, or rarely `null` or a value of another type.
fn maybe(rng: &mut fastrand::Rng, value: Value) -> Value {
    match rng.u8(..60) {
        0 => Value::Null,
        1 => json!(7),
        2 => json!([]),
        _ => value,
    }
}

/// Returns an object with these fields, of which some are left out, spelt in capitals or replaced.
fn object(rng: &mut fastrand::Rng, fields: Vec<(&str, Value)>) -> Value {
    let mut object = serde_json::Map::new();
    for (name, value) in fields {
        let name = match rng.u8(..40) {
            0 => continue,
            1 => name.to_ascii_uppercase(),
            _ => name.to_owned(),
        };
        object.insert(name, maybe(rng, value));
    }
    if rng.u8(..20) == 0 {
        object.insert("unknown".to_owned(), json!([{}]));
    }
    maybe(rng, Value::Object(object))
}
