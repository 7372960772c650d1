//! HTTP requests to a member. They are written by hand, because two kinds of request do not justify
//! an HTTP client.

use std::{io, net::Ipv4Addr, time::Duration};

use serde::Deserialize;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// Timeout of one request. It is needed because a frozen member accepts connections and never
/// responds.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(1);

/// The fields of etcd's status response that this module uses. The JSON of etcd contains 64-bit
/// numbers as strings.
#[derive(Debug, Deserialize)]
struct Status {
    /// The header, with the id of the responding member.
    header: Header,
    /// The member id of the leader; absent if the cluster has no leader.
    #[serde(default)]
    leader: String,
}

/// The header of a [`Status`].
#[derive(Debug, Deserialize)]
struct Header {
    /// The id of the responding member.
    member_id: String,
    /// The raft term of the responding member.
    #[serde(default)]
    raft_term: String,
}

/// Returns whether the member is healthy. The health check of etcd requires a leader and a read
/// through consensus.
pub(super) async fn is_healthy(port: u16) -> bool {
    let body = request(port, "GET /health", "").await;
    body.is_some_and(|body| body.contains(r#""health":"true""#))
}

/// Returns the raft term of the member if it reports itself as the leader, else `None`.
pub(super) async fn leading_term(port: u16) -> Option<u64> {
    let body = request(port, "POST /v3/maintenance/status", "{}").await?;
    parse_leading_term(&body)
}

/// Returns the id that the member sends in its requests to other members.
pub(super) async fn member_id(port: u16) -> Option<u64> {
    let body = request(port, "POST /v3/maintenance/status", "{}").await?;
    let status: Status = serde_json::from_str(&body).ok()?;
    status.header.member_id.parse().ok()
}

/// Parses the response body of [`leading_term`].
fn parse_leading_term(body: &str) -> Option<u64> {
    let status: Status = serde_json::from_str(body).ok()?;
    let leads = status.leader == status.header.member_id;
    leads.then(|| status.header.raft_term.parse().unwrap_or(0))
}

/// Sends one request on a new connection and returns the body of the response.
async fn request(port: u16, target: &str, body: &str) -> Option<String> {
    let exchange = async {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
        let request = format!(
            "{target} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok::<_, io::Error>(answer)
    };
    let answer = timeout(REQUEST_TIMEOUT, exchange).await.ok()?.ok()?;
    let (_head, body) = answer.split_once("\r\n\r\n")?;
    Some(body.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A status response of etcd 3.4, shortened.
    fn status(member_id: &str, leader: &str) -> String {
        format!(
            r#"{{"header":{{"cluster_id":"9","member_id":"{member_id}","revision":"1","raft_term":"7"}},"version":"3.4.23"{leader},"raftIndex":"6"}}"#
        )
    }

    #[test]
    fn a_member_leads_only_if_it_reports_its_own_id_as_the_leader() {
        let term = parse_leading_term(&status("12", r#","leader":"12""#));
        assert_eq!(term, Some(7));
        let term = parse_leading_term(&status("12", r#","leader":"13""#));
        assert_eq!(term, None, "must not lead: another member is the leader");
        let term = parse_leading_term(&status("12", ""));
        assert_eq!(term, None, "must not lead: the cluster has no leader");
    }

    #[test]
    fn an_error_body_names_no_leader() {
        let body = r#"{"error":"etcdserver: user name is empty","code":3}"#;
        assert_eq!(parse_leading_term(body), None);
        assert_eq!(parse_leading_term(""), None);
    }
}
