//! Parses `loadBalancingConfig`: a list of policies, of which the first known one applies.

use super::config::LoadBalancing;
use super::error::ServiceConfigError;
use super::node::{Node, escaped};
use crate::balance::{
    FailurePercentageEjection, LbPolicy, LoadReports, OutlierDetection, SuccessRateEjection,
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
    let child = match node.field("childPolicy")? {
        Some(list) => first_known(&list)?,
        None => LoadBalancing::default(),
    };
    Ok(LoadBalancing {
        outlier_detection: Some(detection),
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
    let field = node.field(name)?;
    field.map(|field| field.integer_in(0, u32::MAX)).transpose()
}

fn percentage(node: &Node<'_>, name: &str) -> Result<Option<u32>> {
    let field = node.field(name)?;
    field.map(|field| field.integer_in(0, 100)).transpose()
}

/// Limit on the number of unknown policies in an error.
const SHOWN: usize = 5;
