//! Reads the clock of a member.

use std::time::{Duration, SystemTime};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// Returns by how many seconds the clock of a member is ahead of the clock of this host. gRPC responses contain no time, but etcd's client
/// port also serves HTTP/1, whose responses have a `Date`. Returns `None` if the member does not return one.
pub(super) async fn seconds_ahead(address: &str, limit: Duration) -> Option<i64> {
    let response = timeout(limit, request(address)).await.ok()??;
    let date = date(&response)?;
    Some(difference(date, SystemTime::now()))
}

async fn request(address: &str) -> Option<String> {
    let mut socket = TcpStream::connect(address).await.ok()?;
    let request = format!("GET /version HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.ok()?;
    let mut response = Vec::new();
    // The header is far smaller. The limit protects against a server that sends without end.
    socket
        .take(MAX_RESPONSE)
        .read_to_end(&mut response)
        .await
        .ok()?;
    Some(String::from_utf8_lossy(&response).into_owned())
}

const MAX_RESPONSE: u64 = 16 * 1024;

fn date(response: &str) -> Option<SystemTime> {
    let header = response.split("\r\n\r\n").next()?;
    let value = header.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("date").then_some(value.trim())
    })?;
    httpdate::parse_http_date(value).ok()
}

fn difference(theirs: SystemTime, ours: SystemTime) -> i64 {
    let seconds = |duration: Duration| i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
    match theirs.duration_since(ours) {
        Ok(ahead) => seconds(ahead),
        Err(behind) => -seconds(behind.duration()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_date_of_a_response_is_compared_with_the_clock() {
        let response = "HTTP/1.1 200 OK\r\ncontent-type: x\r\nDate: Thu, 01 Jan 1970 00:01:00 GMT\r\n\r\nDate: no";
        let theirs = date(response).expect("the response has a date");
        assert_eq!(difference(theirs, SystemTime::UNIX_EPOCH), 60);
        let later = SystemTime::UNIX_EPOCH + Duration::from_secs(90);
        assert_eq!(difference(theirs, later), -30);
        assert_eq!(date("HTTP/1.1 200 OK\r\n\r\n"), None);
    }
}
