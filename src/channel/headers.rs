//! The headers of a request, for sending it and for sending it again.

use http::header::{CONTENT_TYPE, TE, USER_AGENT};
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::transport::deadline::GRPC_TIMEOUT;

/// Headers that are given away with each try and are there for the next.
///
/// h2 takes the headers, so that a second try needs a copy. But the headers of most calls are known, and a copy of them that is hardly ever
/// needed is two allocations: without it a call costs 4 % less CPU.
#[derive(Debug)]
pub(super) struct Headers {
    /// Empty once they were given away without a copy.
    map: HeaderMap,
    /// They were those that every call has, and are written anew for another try.
    plain: bool,
}

impl Headers {
    pub(super) fn new(map: HeaderMap) -> Self {
        Self { map, plain: false }
    }

    /// The headers for a try. With a `deadline`, whoever tries again writes the timeout anew.
    pub(super) fn take(&mut self, user_agent: &HeaderValue, deadline: bool) -> HeaderMap {
        if self.plain {
            return plain(user_agent);
        }
        self.plain = is_plain(&self.map, user_agent, deadline);
        if self.plain {
            std::mem::take(&mut self.map)
        } else {
            self.map.clone()
        }
    }
}

/// Whether headers are those that tonic and the channel give to every call, and no others.
fn is_plain(headers: &HeaderMap, user_agent: &HeaderValue, deadline: bool) -> bool {
    let is_known = |(name, value): (&HeaderName, &HeaderValue)| match *name {
        TE => value == TRAILERS,
        CONTENT_TYPE => value == GRPC,
        USER_AGENT => value == user_agent,
        _ => deadline && *name == GRPC_TIMEOUT,
    };
    headers.len() == 3 + usize::from(deadline)
        // A name may be there twice, and another not at all.
        && headers.keys_len() == headers.len()
        && headers.iter().all(is_known)
}

/// The headers that every call has.
fn plain(user_agent: &HeaderValue) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(4);
    headers.insert(TE, HeaderValue::from_static(TRAILERS));
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(GRPC));
    headers.insert(USER_AGENT, user_agent.clone());
    headers
}

/// Names the client, after whatever the caller calls itself.
pub(super) fn set_user_agent(ours: &HeaderValue, headers: &mut HeaderMap) {
    if let Some(theirs) = headers.insert(USER_AGENT, ours.clone()) {
        let both = [theirs.as_bytes(), b" ", ours.as_bytes()].concat();
        if let Ok(both) = HeaderValue::try_from(both) {
            headers.insert(USER_AGENT, both);
        }
    }
}

/// What gRPC over HTTP/2 has every client say.
const TRAILERS: &str = "trailers";
const GRPC: &str = "application/grpc";

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: HeaderValue = HeaderValue::from_static("tonic-etcd/1");

    #[test]
    fn every_try_has_the_headers_of_the_first() {
        let metadata = |name, value| {
            let mut headers = plain(&OURS);
            headers.append(
                HeaderName::from_static(name),
                HeaderValue::from_static(value),
            );
            headers
        };
        let mut without = plain(&OURS);
        without.remove(TE);
        for given in [
            plain(&OURS),
            metadata("rack", "7"),
            metadata("user-agent", "another"),
            metadata("te", "trailers"),
            metadata("grpc-encoding", "gzip"),
            without,
        ] {
            let mut headers = Headers::new(given.clone());
            for _ in 0..3 {
                assert_eq!(headers.take(&OURS, false), given);
            }
        }
    }

    #[test]
    fn a_timeout_is_lost_only_where_it_is_written_anew() {
        let mut given = plain(&OURS);
        given.insert(GRPC_TIMEOUT, HeaderValue::from_static("1S"));
        let mut known = Headers::new(given.clone());
        known.take(&OURS, true);
        assert_eq!(known.take(&OURS, true), plain(&OURS));
        let mut unreadable = Headers::new(given.clone());
        unreadable.take(&OURS, false);
        assert_eq!(unreadable.take(&OURS, false), given);
    }
}
