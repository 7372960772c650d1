//! Parses `loadBalancingConfig`: a list of policies, of which the first known one applies.

use http::HeaderName;

use super::config::LoadBalancing;
use super::error::ServiceConfigError;
use super::node::{Node, escaped};
use crate::balance::{
    FailurePercentageEjection, LbPolicy, LoadReports, OutlierDetection, SuccessRateEjection,
    TrafficSplit,
};

type Result<T> = std::result::Result<T, ServiceConfigError>;

/// A policy that a service config can name.
struct Known {
    name: &'static str,
    parse: fn(&Node<'_>) -> Result<LoadBalancing>,
}

/// The known policies. A policy that is not in this list is skipped, as if it were not in the service config.
const KNOWN: &[Known] = &[
    Known {
        name: "round_robin",
        // The policy has no settings, and grpc-go does not read them.
        parse: |_| Ok(only(LbPolicy::WeightedRoundRobin)),
    },
    Known {
        name: "weighted_round_robin",
        parse: weighted_round_robin,
    },
    Known {
        name: "least_request_experimental",
        parse: least_request,
    },
    Known {
        name: "latency_experimental",
        parse: |node| node.object().map(|()| only(LbPolicy::Latency)),
    },
    Known {
        name: "outlier_detection_experimental",
        parse: outlier_detection,
    },
    Known {
        name: "ring_hash_experimental",
        parse: ring_hash,
    },
    Known {
        name: "split_experimental",
        parse: split,
    },
    Known {
        name: "random_subsetting_experimental",
        parse: random_subsetting,
    },
];

fn only(policy: LbPolicy) -> LoadBalancing {
    LoadBalancing {
        policy: Some(policy),
        ..LoadBalancing::default()
    }
}

/// Parses the policy of a service config: `loadBalancingConfig`, or, without it, the older field `loadBalancingPolicy`.
pub(super) fn load_balancing(root: &Node<'_>) -> Result<LoadBalancing> {
    let older = root.field("loadBalancingPolicy")?;
    let older = older.map(|name| name.text()).transpose()?;
    if let Some(list) = root.field("loadBalancingConfig")? {
        return first_known(&list);
    }
    // The older field names a policy in capitals, and an unknown name is ignored.
    let known = older.and_then(|name| known(&name.to_ascii_lowercase()));
    known.map_or_else(
        || Ok(LoadBalancing::default()),
        |known| (known.parse)(&Node::root(&serde_json::Value::Null)),
    )
}

/// Parses the first known policy of a list. The policies after it are not read.
fn first_known(list: &Node<'_>) -> Result<LoadBalancing> {
    let items = list.items()?;
    // grpc-go decodes the whole list before it looks for a known policy.
    for item in &items {
        item.object()?;
    }
    let mut unknown = Vec::new();
    for item in items {
        let (name, config) = item.only_field()?;
        match known(name) {
            Some(known) => return (known.parse)(&config),
            None => unknown.push(escaped(name)),
        }
    }
    let shown = unknown.len().min(SHOWN);
    let found = match unknown.len() {
        0 => "an empty list".to_owned(),
        _ => format!("only {}", unknown[..shown].join(", ")),
    };
    let names: Vec<_> = KNOWN.iter().map(|known| known.name).collect();
    Err(list.rejected(format_args!("one of {}", names.join(", ")), &found))
}

fn known(name: &str) -> Option<&'static Known> {
    KNOWN.iter().find(|known| known.name == name)
}

/// Parses the settings of gRFC A58, with the defaults of the gRFC. Channels read the reports in the trailers of responses, and no others, so
/// the settings of the out-of-band service have no effect.
fn weighted_round_robin(node: &Node<'_>) -> Result<LoadBalancing> {
    let duration = |name| match node.field_or_null(name)? {
        Some(field) => field.duration().map(Some),
        None => Ok(None),
    };
    if let Some(enabled) = node.field("enableOobLoadReport")? {
        enabled.boolean()?;
    }
    duration("oobReportingPeriod")?;
    let mut reports = LoadReports::new();
    if let Some(period) = duration("blackoutPeriod")? {
        reports = reports.blackout_period(period);
    }
    if let Some(period) = duration("weightExpirationPeriod")? {
        reports = reports.weight_expiration_period(period);
    }
    if let Some(period) = duration("weightUpdatePeriod")? {
        reports = reports.weight_update_period(period);
    }
    if let Some(penalty) = node.field("errorUtilizationPenalty")? {
        let penalty = penalty.number("a number of at least 0", |penalty| penalty >= 0.0)?;
        reports = reports.error_utilization_penalty(penalty);
    }
    Ok(LoadBalancing {
        load_weights: Some(reports),
        ..only(LbPolicy::WeightedRoundRobin)
    })
}

/// Parses the settings of gRFC A48. The policy always draws two endpoints, whatever `choiceCount` is.
fn least_request(node: &Node<'_>) -> Result<LoadBalancing> {
    if let Some(count) = node.field("choiceCount")? {
        count.integer_in(2, u32::MAX)?;
    }
    Ok(only(LbPolicy::LeastRequest))
}

/// Parses the settings of gRFC A50, with the defaults of the gRFC, and the policy inside.
fn outlier_detection(node: &Node<'_>) -> Result<LoadBalancing> {
    let duration = |name| match node.field_or_null(name)? {
        Some(field) => field.duration().map(Some),
        None => Ok(None),
    };
    let mut detection = OutlierDetection::new()
        .without_success_rate()
        .without_failure_percentage();
    if let Some(interval) = duration("interval")? {
        detection = detection.interval(interval);
    }
    if let Some(time) = duration("baseEjectionTime")? {
        detection = detection.base_ejection_time(time);
    }
    if let Some(time) = duration("maxEjectionTime")? {
        detection = detection.max_ejection_time(time);
    }
    if let Some(percent) = percentage(node, "maxEjectionPercent")? {
        detection = detection.max_ejection_percent(percent);
    }
    if let Some(rule) = node.field("successRateEjection")? {
        detection = detection.success_rate(success_rate(&rule)?);
    }
    if let Some(rule) = node.field("failurePercentageEjection")? {
        detection = detection.failure_percentage(failure_percentage(&rule)?);
    }
    Ok(LoadBalancing {
        outlier_detection: Some(detection),
        ..child_policy(node)?
    })
}

/// Parses the policy inside another one, if there is one.
fn child_policy(node: &Node<'_>) -> Result<LoadBalancing> {
    match node.field("childPolicy")? {
        Some(list) => first_known(&list),
        None => Ok(LoadBalancing::default()),
    }
}

/// Parses the settings of gRFCs A42 and A76. The sizes are checked as grpc-go does. They have no effect, because the ring of this library has
/// a fixed size.
fn ring_hash(node: &Node<'_>) -> Result<LoadBalancing> {
    let size = |name, default| match integer_up_to(node, name, MAX_RING_SIZE)? {
        None | Some(0) => Ok(default),
        Some(size) => Ok(size),
    };
    let (least, most) = (size("minRingSize", 1_024)?, size("maxRingSize", 4_096)?);
    if least > most {
        let reason = format!("the minRingSize {least} is greater than the maxRingSize {most}");
        return Err(node.unusable(reason));
    }
    let header = node.field("requestHashHeader")?;
    Ok(LoadBalancing {
        hash_header: header.as_ref().map(hash_header).transpose()?.flatten(),
        ..only(LbPolicy::RingHash)
    })
}

/// Parses the name of a header. The empty name stands for none. Headers with the suffix `-bin` have encoded values, so gRFC A76 excludes them.
fn hash_header(node: &Node<'_>) -> Result<Option<HeaderName>> {
    let name = node.text()?.to_ascii_lowercase();
    if name.is_empty() {
        return Ok(None);
    }
    let is_valid = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let name = Some(name).filter(|name| name.bytes().all(is_valid) && !name.ends_with("-bin"));
    let header = name.and_then(|name| name.parse().ok());
    let expected = "the name of a header, without the suffix -bin";
    header.map(Some).ok_or_else(|| node.unexpected(expected))
}

/// Parses the traffic split of this library, and the policy inside. A part without labels is the rest.
fn split(node: &Node<'_>) -> Result<LoadBalancing> {
    const PARTS: &str = "an array with at least one part";
    let parts = node.field("split")?;
    let parts = parts.ok_or_else(|| node.missing("split", PARTS))?;
    let mut split = TrafficSplit::new();
    for part in parts.items()? {
        let labels = part.field("label")?;
        let labels = labels.map_or_else(|| Ok(Vec::new()), |labels| labels.texts())?;
        let weight = integer(&part, "weight")?;
        let weight = weight.ok_or_else(|| part.missing("weight", "an integer of at least 0"))?;
        split = split.part(labels, weight);
    }
    if split.is_empty() {
        return Err(parts.rejected(PARTS, "an empty array"));
    }
    if let Some(reason) = split.invalid_reason() {
        return Err(parts.unusable(reason));
    }
    Ok(LoadBalancing {
        split: Some(split),
        ..child_policy(node)?
    })
}

/// Parses the settings of gRFC A68, and the policy inside. As in grpc-go, both fields are required, and have the names of Protobuf's JSON.
fn random_subsetting(node: &Node<'_>) -> Result<LoadBalancing> {
    let size = match node.field("subsetSize")? {
        Some(size) => size.integer_in(1, u32::MAX)?,
        None => return Err(node.missing("subsetSize", "an integer of at least 1")),
    };
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    let child = match node.field("childPolicy")? {
        Some(list) => first_known(&list)?,
        None => return Err(node.missing("childPolicy", "a list of policies")),
    };
    Ok(LoadBalancing {
        // A subset of a subset has the smaller of the two sizes.
        subset_size: Some(child.subset_size.map_or(size, |inner| inner.min(size))),
        ..child
    })
}

fn success_rate(node: &Node<'_>) -> Result<SuccessRateEjection> {
    let mut rule = SuccessRateEjection::new();
    if let Some(factor) = integer(node, "stdevFactor")? {
        rule = rule.stdev_factor(factor);
    }
    if let Some(percent) = percentage(node, "enforcementPercentage")? {
        rule = rule.enforcement_percentage(percent);
    }
    if let Some(hosts) = integer(node, "minimumHosts")? {
        rule = rule.minimum_hosts(usize::try_from(hosts).unwrap_or(usize::MAX));
    }
    if let Some(calls) = integer(node, "requestVolume")? {
        rule = rule.request_volume(calls.into());
    }
    Ok(rule)
}

fn failure_percentage(node: &Node<'_>) -> Result<FailurePercentageEjection> {
    // In gRFC A50, the default of this rule is that it is not enforced.
    let mut rule = FailurePercentageEjection::new().enforcement_percentage(0);
    if let Some(percent) = percentage(node, "threshold")? {
        rule = rule.threshold(percent);
    }
    if let Some(percent) = percentage(node, "enforcementPercentage")? {
        rule = rule.enforcement_percentage(percent);
    }
    if let Some(hosts) = integer(node, "minimumHosts")? {
        rule = rule.minimum_hosts(usize::try_from(hosts).unwrap_or(usize::MAX));
    }
    if let Some(calls) = integer(node, "requestVolume")? {
        rule = rule.request_volume(calls.into());
    }
    Ok(rule)
}

fn integer(node: &Node<'_>, name: &str) -> Result<Option<u32>> {
    integer_up_to(node, name, u32::MAX)
}

fn percentage(node: &Node<'_>, name: &str) -> Result<Option<u32>> {
    integer_up_to(node, name, 100)
}

fn integer_up_to(node: &Node<'_>, name: &str, most: u32) -> Result<Option<u32>> {
    let field = node.field(name)?;
    field.map(|field| field.integer_in(0, most)).transpose()
}

/// Limit on the sizes of a ring in gRFC A42.
const MAX_RING_SIZE: u32 = 8 << 20;

/// Limit on the number of unknown policies in an error.
const SHOWN: usize = 5;
