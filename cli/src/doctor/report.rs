//! Writes the answers to the questions, and the findings.

use serde_json::json;

use super::facts::{Access, Facts};
use super::findings::{Finding, Question};
use crate::error::Failure;
use crate::escape::escaped;
use crate::output::Output;
use crate::probe::millis;

/// Writes one line for each question without a finding, and two lines for each finding. In JSON, writes one value for each finding and a
/// summary.
pub(super) fn write(
    facts: &Facts,
    findings: &[Finding],
    output: &mut Output,
) -> Result<(), Failure> {
    if output.is_json() {
        for finding in findings {
            output.json(&json!({
                "finding": finding.name,
                "question": finding.question.as_str(),
                "subject": finding.subject,
                "problem": finding.problem,
                "advice": finding.advice,
            }))?;
        }
        output.json(&json!({ "findings": findings.len() }))?;
        return Ok(());
    }
    for question in Question::ALL {
        let mut own = findings
            .iter()
            .filter(|finding| finding.question == question)
            .peekable();
        if own.peek().is_none() {
            if facts.connection.is_ok() {
                output.line(&format!(
                    "{:<12} {}",
                    question.as_str(),
                    answer(question, facts)
                ))?;
            }
            continue;
        }
        for finding in own {
            let Finding {
                name,
                subject,
                problem,
                advice,
                ..
            } = finding;
            output.line(&format!(
                "{:<12} FINDING {name}: {subject}: {problem}",
                question.as_str()
            ))?;
            output.line(&format!("{:<12}   what to do: {advice}", ""))?;
        }
    }
    match findings.len() {
        0 => output.line("no findings")?,
        1 => output.line("1 finding")?,
        count => output.line(&format!("{count} findings"))?,
    }
    Ok(())
}

/// Returns the answer to a question that has no finding. If the question could not be answered, the answer contains the reason.
fn answer(question: Question, facts: &Facts) -> String {
    let keys = || facts.services.iter().flat_map(|service| &service.keys);
    let unknown = |reason: &str| format!("not checked: {}", escaped(reason));
    if facts.read != Access::Granted && question > Question::Permissions {
        return unknown("the keys cannot be read");
    }
    match question {
        Question::Connection => format!(
            "ok: etcd responds at {}",
            escaped(&facts.endpoints.join(","))
        ),
        Question::Members => match &facts.members {
            Ok(_) => members(facts),
            Err(reason) => unknown(reason),
        },
        Question::Alarms => match &facts.alarms {
            Ok(_) => "ok: none".to_owned(),
            Err(reason) => unknown(reason),
        },
        Question::Clock if facts.clocks.is_empty() => unknown("no member returned its time"),
        Question::Clock => {
            let largest = facts
                .clocks
                .iter()
                .map(|clock| clock.seconds_ahead.abs())
                .max();
            format!("ok: within {} s", largest.unwrap_or_default() + 1)
        }
        Question::Permissions => {
            let text = |access: &Access| match access {
                Access::Granted => "granted".to_owned(),
                Access::Denied => "denied".to_owned(),
                Access::Unknown(reason) => unknown(reason),
            };
            format!(
                "ok: read {}, write {} below {}",
                text(&facts.read),
                text(&facts.write),
                escaped(&facts.prefix)
            )
        }
        Question::Registered => {
            let names: Vec<_> = facts.services.iter().map(|it| escaped(&it.name)).collect();
            format!("ok: {} keys of {}", keys().count(), names.join(", "))
        }
        Question::Values => "ok: all values can be read".to_owned(),
        Question::Leases => "ok: each key has a lease that is renewed".to_owned(),
        Question::Addresses => "ok: no duplicates, no loopback addresses among others".to_owned(),
        Question::Servers => {
            let dialled = keys().filter(|key| key.answer.is_some()).count();
            let instances = keys().filter(|key| key.address.is_some()).count();
            if dialled == 0 && instances > 0 {
                return unknown("--no-dial is set");
            }
            format!("ok: {dialled} of {instances} instances respond as expected")
        }
    }
}

fn members(facts: &Facts) -> String {
    let members: Vec<_> = facts
        .members
        .iter()
        .flatten()
        .filter_map(|member| {
            let status = member.answer.as_ref().ok()?;
            Some(format!(
                "{} {} {}",
                escaped(&member.name),
                escaped(&status.version),
                millis(status.latency)
            ))
        })
        .collect();
    format!("ok: {}", members.join(", "))
}
