//! The fields of a service config, and the errors.
#![allow(clippy::panic, reason = "a failed step is a failed test")]

use std::time::Duration;

use proptest::prelude::*;
use tonic::Code;

use super::ServiceConfig;
use crate::balance::{
    FailurePercentageEjection, LbPolicy, LoadReports, OutlierDetection, SuccessRateEjection,
    TrafficSplit,
};
use crate::call::method_config::{MethodPolicy, MethodSettings, MethodTimeout};
use crate::call::retry::{HedgingPolicy, RetryBudget, RetryPolicy};

fn parse(json: &str) -> ServiceConfig {
    json.parse()
        .unwrap_or_else(|error| panic!("{json}: {error}"))
}

fn rejected(json: &str) -> String {
    let parsed = json.parse::<ServiceConfig>();
    parsed.expect_err(json).to_string()
}

#[test]
fn the_entries_of_methods_are_parsed() {
    let config = parse(
        r#"{"methodConfig": [
            {"name": [{}], "waitForReady": true},
            {"name": [{"service": "a.A"}, {"service": "b.B", "method": ""}], "timeout": "0.25s",
             "maxRequestMessageBytes": 1024, "maxResponseMessageBytes": 99999999999},
            {"name": [{"service": "a.A", "method": "Get"}], "retryPolicy": {
                "maxAttempts": 9, "initialBackoff": "0.1s", "maxBackoff": "1s", "backoffMultiplier": 1.5,
                "retryableStatusCodes": ["UNAVAILABLE", 10, "CANCELLED"]}},
            {"name": [{"service": "a.A", "method": "Put"}], "hedgingPolicy": {
                "maxAttempts": 3, "hedgingDelay": "0.02s", "nonFatalStatusCodes": ["INTERNAL"]}},
            {"timeout": "1s"}
        ]}"#,
    );
    let table = &config.parsed().methods;
    let settings = MethodSettings::default();
    let of_all = MethodSettings {
        wait_for_ready: Some(true),
        ..settings.clone()
    };
    assert_eq!(table.all, Some(of_all));
    let of_service = MethodSettings {
        timeout: Some(MethodTimeout::new(Duration::from_millis(250))),
        max_request_bytes: Some(1_024),
        max_response_bytes: Some(u32::MAX),
        ..settings.clone()
    };
    assert_eq!(table.named["a.A/"], of_service);
    assert_eq!(table.named["b.B/"], of_service);
    let retry = RetryPolicy::new([Code::Unavailable, Code::Aborted, Code::Cancelled])
        .max_attempts(5)
        .initial_backoff(Duration::from_millis(100))
        .max_backoff(Duration::from_secs(1))
        .multiplier(1.5);
    let retry = Some(MethodPolicy::Retry(retry));
    assert_eq!(table.named["a.A/Get"].policy, retry);
    let hedging =
        HedgingPolicy::new(3, Duration::from_millis(20)).non_fatal_codes([Code::Internal]);
    let hedging = Some(MethodPolicy::Hedge(hedging));
    assert_eq!(table.named["a.A/Put"].policy, hedging);
    assert_eq!(table.named.len(), 4);
}

#[test]
fn the_fields_of_the_channel_are_parsed() {
    let config = parse(
        r#"{"retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
            "healthCheckConfig": {"serviceName": "greeter"},
            "unknown": {"of": "a later version"}}"#,
    );
    let parsed = config.parsed();
    assert_eq!(parsed.retry_throttling, Some(RetryBudget::new(10, 0.1)));
    assert_eq!(parsed.health_check.as_deref(), Some("greeter"));
    assert_eq!(parsed.balancing.policy, None);
    for empty in [
        "{}",
        "null",
        r#"{"methodConfig": null}"#,
        r#"{"healthCheckConfig": {}}"#,
    ] {
        let config = parse(empty);
        assert_eq!(config.as_json(), empty);
        assert_eq!(config.parsed().health_check, None);
        assert!(config.parsed().methods.named.is_empty());
    }
}

#[test]
fn the_first_known_policy_applies() {
    for (list, policy) in [
        (r#"[{"round_robin": {}}]"#, LbPolicy::WeightedRoundRobin),
        (
            r#"[{"unheard_of": {"a": 1}}, {"weighted_round_robin": {"weightUpdatePeriod": "0.5s"}}]"#,
            LbPolicy::WeightedRoundRobin,
        ),
        (
            r#"[{"least_request_experimental": {"choiceCount": 3}}, {}]"#,
            LbPolicy::LeastRequest,
        ),
        (r#"[{"latency_experimental": {}}]"#, LbPolicy::Latency),
        (
            r#"[{"ring_hash_experimental": {"minRingSize": 5, "maxRingSize": 8388608}}]"#,
            LbPolicy::RingHash,
        ),
        (
            r#"[{"split_experimental": {"split": [{"weight": 1}], "childPolicy": [{"latency_experimental": {}}]}}]"#,
            LbPolicy::Latency,
        ),
    ] {
        let config = parse(&format!(r#"{{"loadBalancingConfig": {list}}}"#));
        assert_eq!(config.parsed().balancing.policy, Some(policy), "{list}");
    }
    let older = |name| parse(&format!(r#"{{"loadBalancingPolicy": "{name}"}}"#));
    let policy = |name| older(name).parsed().balancing.policy;
    assert_eq!(policy("ROUND_ROBIN"), Some(LbPolicy::WeightedRoundRobin));
    assert_eq!(policy("unheard_of"), None);
}

#[test]
fn weighted_round_robin_has_the_settings_of_its_load_reports() {
    let weights = |list: &str| {
        let config = parse(&format!(r#"{{"loadBalancingConfig": [{list}]}}"#));
        config.parsed().balancing.load_weights.clone()
    };
    let defaults = weights(r#"{"weighted_round_robin": {}}"#);
    assert_eq!(defaults, Some(LoadReports::new()));
    let all = r#"{"weighted_round_robin": {"enableOobLoadReport": true, "oobReportingPeriod": "20s", "blackoutPeriod": "0s",
        "weightExpirationPeriod": "60s", "weightUpdatePeriod": "0.5s", "errorUtilizationPenalty": 2.5}}"#;
    let expected = LoadReports::new()
        .blackout_period(Duration::ZERO)
        .weight_expiration_period(Duration::from_secs(60))
        .weight_update_period(Duration::from_millis(500))
        .error_utilization_penalty(2.5);
    assert_eq!(weights(all), Some(expected.clone()));
    let wrapped = format!(r#"{{"outlier_detection_experimental": {{"childPolicy": [{all}]}}}}"#);
    assert_eq!(weights(&wrapped), Some(expected));
    let fast = weights(r#"{"weighted_round_robin": {"weightUpdatePeriod": "0.001s"}}"#);
    let minimum = LoadReports::new().weight_update_period(Duration::from_millis(100));
    assert_eq!(fast, Some(minimum), "the minimum of gRFC A58");
    assert_eq!(weights(r#"{"round_robin": {}}"#), None);
}

#[test]
fn outlier_detection_wraps_a_policy() {
    let config = parse(
        r#"{"loadBalancingConfig": [{"outlier_detection_experimental": {
            "interval": "5s", "baseEjectionTime": "20s", "maxEjectionTime": "60s", "maxEjectionPercent": 50,
            "successRateEjection": {"stdevFactor": 1000, "minimumHosts": 3, "requestVolume": 20},
            "failurePercentageEjection": {"threshold": 60, "enforcementPercentage": 100, "minimumHosts": 2, "requestVolume": 10},
            "childPolicy": [{"least_request_experimental": {}}]
        }}]}"#,
    );
    let success_rate = SuccessRateEjection::new()
        .stdev_factor(1_000)
        .minimum_hosts(3)
        .request_volume(20);
    let failure_percentage = FailurePercentageEjection::new()
        .threshold(60)
        .minimum_hosts(2)
        .request_volume(10);
    let detection = OutlierDetection::new()
        .interval(Duration::from_secs(5))
        .base_ejection_time(Duration::from_secs(20))
        .max_ejection_time(Duration::from_secs(60))
        .max_ejection_percent(50)
        .success_rate(success_rate)
        .failure_percentage(failure_percentage);
    let balancing = &config.parsed().balancing;
    assert_eq!(balancing.policy, Some(LbPolicy::LeastRequest));
    assert_eq!(balancing.outlier_detection, Some(detection));
    // Without the objects of the rules, no endpoint is ejected, and the rule for the percentage of failures is not enforced by default.
    let config = parse(
        r#"{"loadBalancingConfig": [{"outlier_detection_experimental": {"failurePercentageEjection": {}}}]}"#,
    );
    let rule = FailurePercentageEjection::new().enforcement_percentage(0);
    let detection = OutlierDetection::new()
        .without_success_rate()
        .failure_percentage(rule);
    let balancing = &config.parsed().balancing;
    assert_eq!(balancing.policy, None);
    assert_eq!(balancing.outlier_detection, Some(detection));
}

#[test]
fn the_header_of_the_consistent_hash_is_parsed() {
    let header = |config: &str| {
        let config = parse(&format!(
            r#"{{"loadBalancingConfig": [{{"ring_hash_experimental": {config}}}]}}"#
        ));
        let header = config.parsed().balancing.hash_header.clone();
        header.map(|header| header.as_str().to_owned())
    };
    for none in ["{}", "null", r#"{"requestHashHeader": ""}"#] {
        assert_eq!(header(none), None);
    }
    let named = r#"{"requestHashHeader": "X-Customer.Id_1", "minRingSize": 0}"#;
    assert_eq!(header(named).as_deref(), Some("x-customer.id_1"));
}

#[test]
fn a_traffic_split_is_parsed() {
    let config = parse(
        r#"{"loadBalancingConfig": [{"outlier_detection_experimental": {"childPolicy": [{"split_experimental": {
            "split": [
                {"label": {"version": "1.2", "track": "canary"}, "weight": 5},
                {"label": {"version": "1.3"}, "weight": 0},
                {"weight": 95}
            ],
            "childPolicy": [{"round_robin": {}}]
        }}]}}]}"#,
    );
    let expected = TrafficSplit::new()
        .part([("track", "canary"), ("version", "1.2")], 5)
        .version("1.3", 0)
        .rest(95);
    let balancing = &config.parsed().balancing;
    assert_eq!(balancing.split, Some(expected));
    assert_eq!(balancing.policy, Some(LbPolicy::WeightedRoundRobin));
    assert!(balancing.outlier_detection.is_some());
    let config = parse(r#"{"loadBalancingConfig": [{"round_robin": {}}]}"#);
    assert_eq!(config.parsed().balancing.split, None);
}

#[test]
fn a_subset_wraps_a_policy_or_outlier_detection_and_the_reverse() {
    let balancing = |list: &str| {
        let config = parse(&format!(r#"{{"loadBalancingConfig": [{list}]}}"#));
        config.parsed().balancing.clone()
    };
    let least_request = r#"{"least_request_experimental": {}}"#;
    let subset = |size: u32, child: &str| {
        format!(
            r#"{{"random_subsetting_experimental": {{"subsetSize": {size}, "childPolicy": [{child}]}}}}"#
        )
    };
    let detection = |child: &str| {
        format!(r#"{{"outlier_detection_experimental": {{"childPolicy": [{child}]}}}}"#)
    };
    let plain = balancing(&subset(20, least_request));
    assert_eq!(plain.subset_size, Some(20));
    assert_eq!(plain.policy, Some(LbPolicy::LeastRequest));
    assert_eq!(plain.outlier_detection, None);
    let inside = balancing(&subset(20, &detection(least_request)));
    let around = balancing(&detection(&subset(20, least_request)));
    assert!(inside.outlier_detection.is_some());
    assert_eq!(inside, around);
    assert_eq!(inside.subset_size, Some(20));
    let nested = balancing(&subset(20, &subset(5, least_request)));
    assert_eq!(nested.subset_size, Some(5));
}

#[test]
fn an_error_names_the_field_and_what_is_expected() {
    let retry = |fields: &str| {
        format!(
            r#"{{"methodConfig": [{{"name": [{{}}]}}, {{"name": [{{"service": "a"}}], "retryPolicy": {{{fields}}}}}]}}"#
        )
    };
    let complete =
        r#""maxAttempts": 2, "initialBackoff": "1s", "maxBackoff": "1s", "backoffMultiplier": 2"#;
    for (json, error) in [
        ("[]".to_owned(), "expected an object, found an array"),
        (
            r#"{"methodConfig": {}}"#.to_owned(),
            "methodConfig: expected an array, found an object",
        ),
        (
            r#"{"methodConfig": [{"name": [{}], "timeout": 1.5}]}"#.to_owned(),
            r#"methodConfig[0].timeout: expected a duration such as "1.5s", found 1.5"#,
        ),
        (
            r#"{"methodConfig": [{"name": [{}], "waitForReady": "yes"}]}"#.to_owned(),
            r#"methodConfig[0].waitForReady: expected true or false, found "yes""#,
        ),
        (
            r#"{"methodConfig": [{"name": [{"method": "Get"}]}]}"#.to_owned(),
            "methodConfig[0].name[0].service: expected the service of the method, found nothing",
        ),
        (
            r#"{"methodConfig": [{"name": [{"service": "a"}]}, {"name": [{"service": "b"}, {"service": "a"}]}]}"#.to_owned(),
            r#"methodConfig[1].name[1]: expected a name that occurs once, found a second entry for the service "a""#,
        ),
        (
            r#"{"methodConfig": [{"name": [{}]}, {"name": [{"method": ""}]}]}"#.to_owned(),
            "methodConfig[1].name[0]: expected a name that occurs once, found a second entry for all methods",
        ),
        (
            r#"{"methodConfig": [{"maxRequestMessageBytes": -1}]}"#.to_owned(),
            "methodConfig[0].maxRequestMessageBytes: expected an integer of at least 0, found -1",
        ),
        (
            retry(r#""maxAttempts": 1"#),
            "methodConfig[1].retryPolicy.backoffMultiplier: expected a number above 0, found nothing",
        ),
        (
            retry(&format!(r#"{complete}, "retryableStatusCodes": []"#)),
            "methodConfig[1].retryPolicy.retryableStatusCodes: expected an array with at least one status code, found an empty array",
        ),
        (
            retry(&format!(r#"{complete}, "retryableStatusCodes": ["unavailable"]"#)),
            r#"methodConfig[1].retryPolicy.retryableStatusCodes[0]: expected the name of a status code, such as "UNAVAILABLE", found "unavailable""#,
        ),
        (
            retry(&format!(r#"{complete}, "retryableStatusCodes": [14]"#)).replace("2, \"initial", "1, \"initial"),
            "methodConfig[1].retryPolicy.maxAttempts: expected an integer of at least 2, found 1",
        ),
        (
            retry(&format!(r#"{complete}, "retryableStatusCodes": [14]"#)).replace("\"initialBackoff\": \"1s\"", "\"initialBackoff\": \"0s\""),
            r#"methodConfig[1].retryPolicy.initialBackoff: expected a duration above zero, found "0s""#,
        ),
        (
            r#"{"methodConfig": [{"retryPolicy": {}, "hedgingPolicy": {}}]}"#.to_owned(),
            "methodConfig[0].hedgingPolicy: expected no hedgingPolicy beside a retryPolicy, found both",
        ),
        (
            r#"{"methodConfig": [{"hedgingPolicy": {}}]}"#.to_owned(),
            "methodConfig[0].hedgingPolicy.maxAttempts: expected an integer of at least 2, found nothing",
        ),
        (
            r#"{"retryThrottling": {"maxTokens": 1001, "tokenRatio": 1}}"#.to_owned(),
            "retryThrottling.maxTokens: expected a number above 0 and at most 1000, found 1001",
        ),
        (
            r#"{"retryThrottling": {"maxTokens": 10}}"#.to_owned(),
            "retryThrottling.tokenRatio: expected a number above 0, found nothing",
        ),
        (
            r#"{"healthCheckConfig": {"serviceName": 7}}"#.to_owned(),
            "healthCheckConfig.serviceName: expected a string, found 7",
        ),
    ] {
        assert_eq!(rejected(&json), error, "{json}");
    }
    assert!(rejected("").starts_with("the service config is not JSON: EOF"));
    let error = rejected("{\"loadBalancingConfig\": [{\"evil\\u001b[2J\": 1}]}");
    assert!(error.contains(r#"only "evil\u{1b}[2J""#), "{error}");
}

#[test]
fn an_error_of_a_policy_names_the_field_and_what_is_expected() {
    for (json, error) in [
        (
            r#"{"loadBalancingConfig": []}"#,
            "loadBalancingConfig: expected one of round_robin, weighted_round_robin, least_request_experimental, latency_experimental, outlier_detection_experimental, ring_hash_experimental, split_experimental, random_subsetting_experimental, found an empty list",
        ),
        (
            r#"{"loadBalancingConfig": [{"a": 1, "b": 2}]}"#,
            "loadBalancingConfig[0]: expected an object with exactly one field, the name of a policy, found 2 fields",
        ),
        (
            r#"{"loadBalancingConfig": [{"outlier_detection_experimental": {"childPolicy": [{"least_request_experimental": {"choiceCount": 1}}]}}]}"#,
            "loadBalancingConfig[0].outlier_detection_experimental.childPolicy[0].least_request_experimental.choiceCount: expected an integer from 2 to 4294967295, found 1",
        ),
        (
            r#"{"loadBalancingConfig": [{"outlier_detection_experimental": {"maxEjectionPercent": 101}}]}"#,
            "loadBalancingConfig[0].outlier_detection_experimental.maxEjectionPercent: expected an integer from 0 to 100, found 101",
        ),
        (
            r#"{"loadBalancingConfig": [{"random_subsetting_experimental": {"childPolicy": [{"round_robin": {}}]}}]}"#,
            "loadBalancingConfig[0].random_subsetting_experimental.subsetSize: expected an integer of at least 1, found nothing",
        ),
        (
            r#"{"loadBalancingConfig": [{"random_subsetting_experimental": {"subsetSize": 0, "childPolicy": [{"round_robin": {}}]}}]}"#,
            "loadBalancingConfig[0].random_subsetting_experimental.subsetSize: expected an integer from 1 to 4294967295, found 0",
        ),
        (
            r#"{"loadBalancingConfig": [{"random_subsetting_experimental": {"subsetSize": 20}}]}"#,
            "loadBalancingConfig[0].random_subsetting_experimental.childPolicy: expected a list of policies, found nothing",
        ),
        (
            r#"{"loadBalancingConfig": [{"ring_hash_experimental": {"minRingSize": 8388609}}]}"#,
            "loadBalancingConfig[0].ring_hash_experimental.minRingSize: expected an integer from 0 to 8388608, found 8388609",
        ),
        (
            r#"{"loadBalancingConfig": [{"ring_hash_experimental": {"maxRingSize": 1023}}]}"#,
            "loadBalancingConfig[0].ring_hash_experimental: the minRingSize 1024 is greater than the maxRingSize 1023",
        ),
        (
            r#"{"loadBalancingConfig": [{"ring_hash_experimental": {"requestHashHeader": "x-key-BIN"}}]}"#,
            r#"loadBalancingConfig[0].ring_hash_experimental.requestHashHeader: expected the name of a header, without the suffix -bin, found "x-key-BIN""#,
        ),
        (
            r#"{"loadBalancingConfig": [{"split_experimental": {}}]}"#,
            "loadBalancingConfig[0].split_experimental.split: expected an array with at least one part, found nothing",
        ),
        (
            r#"{"loadBalancingConfig": [{"split_experimental": {"split": [{"weight": 1}, {"label": {}}]}}]}"#,
            "loadBalancingConfig[0].split_experimental.split[1].weight: expected an integer of at least 0, found nothing",
        ),
        (
            r#"{"loadBalancingConfig": [{"split_experimental": {"split": [{"weight": 1, "label": {"version": 1.2}}]}}]}"#,
            "loadBalancingConfig[0].split_experimental.split[0].label: expected an object whose values are strings, found an object",
        ),
        (
            r#"{"loadBalancingConfig": [{"split_experimental": {"split": [{"weight": 1}, {"label": {}, "weight": 2}]}}]}"#,
            "loadBalancingConfig[0].split_experimental.split: two parts of the traffic split have the same labels",
        ),
    ] {
        assert_eq!(rejected(json), error, "{json}");
    }
}

#[test]
fn the_text_of_an_error_is_short_and_escaped() {
    let long = "\u{1b}".repeat(10_000);
    let json = serde_json::json!({"methodConfig": [{"name": [{"service": long.clone()}, {"service": long}]}]});
    let error = rejected(&json.to_string());
    assert!(error.len() < 600 && !error.contains('\u{1b}'), "{error}");
    assert!(error.contains("..."), "{error}");
}

#[test]
fn the_path_of_a_deeply_nested_field_is_shortened() {
    let mut policy = r#"{"round_robin": {}, "b": 1}"#.to_owned();
    for _ in 0..30 {
        policy = format!(r#"{{"outlier_detection_experimental": {{"childPolicy": [{policy}]}}}}"#);
    }
    let error = rejected(&format!(r#"{{"loadBalancingConfig": [{policy}]}}"#));
    assert!(error.starts_with("...") && error.len() < 600, "{error}");
    assert!(
        error.contains("childPolicy[0]: expected an object with exactly one field"),
        "{error}"
    );
    // The JSON parser limits the depth, so a hostile document cannot overflow the stack.
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(rejected(&deep).contains("recursion limit"));
}

/// A JSON value whose objects have the fields of a service config.
fn value() -> impl Strategy<Value = serde_json::Value> {
    use serde_json::{Value, json};
    const FIELDS: [&str; 29] = [
        "methodConfig",
        "name",
        "service",
        "method",
        "timeout",
        "TIMEOUT",
        "waitForReady",
        "retryPolicy",
        "hedgingPolicy",
        "maxAttempts",
        "initialBackoff",
        "maxBackoff",
        "backoffMultiplier",
        "retryableStatusCodes",
        "maxRequestMessageBytes",
        "retryThrottling",
        "maxTokens",
        "tokenRatio",
        "loadBalancingConfig",
        "round_robin",
        "outlier_detection_experimental",
        "random_subsetting_experimental",
        "subsetSize",
        "childPolicy",
        "ring_hash_experimental",
        "split_experimental",
        "split",
        "label",
        "weight",
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-3..2_000_i64).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        Just(json!("1.5s")),
        Just(json!("UNAVAILABLE")),
        "\\PC{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 64, 8, |inner| {
        let field = proptest::sample::select(&FIELDS[..]).prop_map(str::to_owned);
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::btree_map(field, inner, 0..6)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn any_document_is_accepted_or_rejected_with_a_short_error(value in value()) {
        let json = value.to_string();
        match json.parse::<ServiceConfig>() {
            Ok(config) => prop_assert_eq!(config.as_json(), json),
            Err(error) => prop_assert!(error.to_string().len() < 600, "{}", error),
        }
    }

    #[test]
    fn any_text_is_accepted_or_rejected(text in "\\PC{0,60}") {
        let _ = text.parse::<ServiceConfig>();
    }

    #[test]
    fn the_number_of_attempts_is_at_most_five(attempts in 2..i64::MAX) {
        let json = format!(
            r#"{{"methodConfig": [{{"name": [{{}}], "hedgingPolicy": {{"maxAttempts": {attempts}}}}}]}}"#
        );
        let config = parse(&json);
        let policy = config.parsed().methods.all.as_ref().and_then(|all| all.policy.clone());
        let expected = HedgingPolicy::new(u32::try_from(attempts.min(5)).unwrap_or(5), Duration::ZERO);
        prop_assert_eq!(policy, Some(MethodPolicy::Hedge(expected.non_fatal_codes([]))));
    }
}
