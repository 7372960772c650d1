//! A *poisoned call*, which is a call whose metadata are too large for the server, beside unrelated callers.

use h2::Reason;
use tokio::time::sleep;
use tonic::{Code, Status};
use tonic_etcd::{BalancedChannel, channel::ChannelBuilder};

use super::support::callers::Callers;
use super::support::peer::{Beyond, Limit, Manner, Peer};
use super::{addresses, hello, ms, over, retrying, say, send, shown};

/// Starts servers that accept 8 KiB of metadata.
async fn limited(servers: usize, announced: bool, beyond: Beyond) -> Vec<Peer> {
    let mut peers = Vec::new();
    for _ in 0..servers {
        peers.push(accepting(LIMIT, announced, beyond).await);
    }
    peers
}

/// Starts a server that accepts this many bytes of metadata.
async fn accepting(bytes: u32, announced: bool, beyond: Beyond) -> Peer {
    let limit = Limit {
        bytes,
        announced,
        beyond,
    };
    Peer::start(Manner {
        limit: Some(limit),
        ..Manner::default()
    })
    .await
}

/// Sends a poisoned call with this many bytes of metadata. The call must fail. Returns its status.
async fn poisoned(channel: &BalancedChannel, bytes: usize) -> Status {
    let mut request = hello();
    request.set_timeout(ms(5_000));
    // The metadata are split over several values, like cookies and tokens.
    for part in 0..4 {
        let key = format!("x-part-{part}");
        let key = tonic::metadata::AsciiMetadataKey::from_bytes(key.as_bytes()).unwrap();
        let value = "0123456789abcdef".repeat(bytes / 64);
        request.metadata_mut().insert(key, value.parse().unwrap());
    }
    let outcome = send(channel, request).await;
    outcome.expect_err("every server must reject the call")
}

fn connections(peers: &[Peer]) -> usize {
    peers.iter().map(Peer::connections).sum()
}

fn oversized(peers: &[Peer]) -> usize {
    peers.iter().map(Peer::oversized).sum()
}

struct Case {
    builder: fn() -> ChannelBuilder,
    servers: usize,
    bytes: usize,
    announced: bool,
    beyond: Beyond,
}

/// Sends three poisoned calls beside eight bystanders, which are unrelated callers.
async fn poison(case: Case) {
    let Case {
        builder,
        servers,
        bytes,
        announced,
        beyond,
    } = case;
    let what = format!("{bytes} bytes, {servers} servers, announced {announced}, {beyond:?}");
    let peers = limited(servers, announced, beyond).await;
    let channel = over(builder(), &addresses(&peers)).await;
    let mut bystanders = Callers::start(&channel, BYSTANDERS);
    sleep(ms(200)).await;
    let mut most = 0;
    let mut statuses = Vec::new();
    for _ in 0..3 {
        let before = oversized(&peers);
        statuses.push(poisoned(&channel, bytes).await);
        most = most.max(oversized(&peers) - before);
        sleep(ms(150)).await;
    }
    let killed = oversized(&peers);
    sleep(ms(500)).await;
    let at_the_end = bystanders.failed();
    let (calls, late) = bystanders.stopped().await;
    let ready = channel.endpoints();
    let ready = ready
        .iter()
        .filter(|one| one.state == tonic_etcd::channel::EndpointState::Ready);
    println!(
        "{what}: {calls} calls of bystanders, {}; {killed} connections killed, at most {most} by one call; {} ready; {:?}",
        shown(&at_the_end),
        ready.count(),
        statuses[0],
    );
    let failed = at_the_end.len() + late.len();
    assert!(
        failed == 0,
        "{what}: bystanders must not fail: {failed} of {calls} failed; {}",
        shown(&at_the_end)
    );
    assert!(
        late.is_empty(),
        "{what}: no bystander may fail after the poisoned calls: {}",
        shown(&late)
    );
    assert!(
        most <= 2,
        "{what}: one call must end at most two connections, not {most}"
    );
    for status in statuses {
        if announced {
            assert_unsent(&status, bytes, &what);
        } else {
            let code = status.code();
            assert!(
                [Code::Unavailable, Code::ResourceExhausted].contains(&code),
                "{what}: {status:?}"
            );
        }
    }
    if announced {
        assert_eq!(
            killed, 0,
            "{what}: a call that the server would reject must not be sent"
        );
        assert_eq!(
            connections(&peers),
            servers,
            "{what}: no connection may be lost"
        );
    }
}

fn assert_unsent(status: &Status, bytes: usize, what: &str) {
    assert_eq!(status.code(), Code::ResourceExhausted, "{what}: {status:?}");
    let message = status.message();
    assert!(
        message.contains(&LIMIT.to_string()),
        "{what}: the message must contain the limit of {LIMIT}: {message}"
    );
    // The size as defined by HTTP/2: names, values and 32 bytes per header.
    let numbers = message.split(|c: char| !c.is_ascii_digit());
    let numbers = numbers.filter_map(|number| number.parse::<usize>().ok());
    assert!(
        numbers
            .into_iter()
            .any(|number| (bytes..bytes + 4_096).contains(&number)),
        "{what}: the message must contain the size of about {bytes}: {message}"
    );
}

const CALM: Beyond = Beyond::Goaway(Reason::ENHANCE_YOUR_CALM);
const COMPRESSION: Beyond = Beyond::Goaway(Reason::COMPRESSION_ERROR);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metadata_beyond_an_announced_limit_are_not_sent() {
    for (builder, servers, bytes) in [
        (
            BalancedChannel::builder as fn() -> ChannelBuilder,
            4,
            20_000,
        ),
        (BalancedChannel::builder, 6, 120_032),
        (retrying, 4, 300_032),
        (retrying, 6, 120_032),
    ] {
        poison(Case {
            builder,
            servers,
            bytes,
            announced: true,
            beyond: CALM,
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_poisoned_call_that_ends_in_goaways_spares_the_bystanders() {
    for (servers, bytes, beyond) in [
        (4, 120_032, CALM),
        (4, 20_000, COMPRESSION),
        (6, 120_032, COMPRESSION),
        (6, 300_032, CALM),
    ] {
        poison(Case {
            builder: BalancedChannel::builder,
            servers,
            bytes,
            announced: false,
            beyond,
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_poisoned_call_under_a_retry_policy_spares_the_bystanders() {
    for (servers, bytes, beyond) in [
        (4, 120_032, CALM),
        (4, 20_000, Beyond::Drop),
        (6, 120_032, COMPRESSION),
        (6, 300_032, Beyond::Drop),
    ] {
        poison(Case {
            builder: retrying,
            servers,
            bytes,
            announced: false,
            beyond,
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_poisoned_call_that_ends_in_closed_connections_spares_the_bystanders() {
    for (servers, bytes) in [(4, 120_032), (6, 20_000)] {
        poison(Case {
            builder: BalancedChannel::builder,
            servers,
            bytes,
            announced: false,
            beyond: Beyond::Drop,
        })
        .await;
    }
}

/// The metadata are so small that the call is first sent on the shared connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_may_have_ended_its_connection_is_sent_again_on_a_separate_connection() {
    for builder in [BalancedChannel::builder as fn() -> ChannelBuilder, retrying] {
        let peer = accepting(4_096, false, CALM).await;
        let channel = over(builder(), &addresses([&peer])).await;
        let status = poisoned(&channel, 6_016).await;
        println!("{status:?}");
        assert!(
            status.message().contains("carried only this call"),
            "the second connection must have carried no other call: {status:?}"
        );
        assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
        assert_eq!(
            peer.oversized(),
            2,
            "the call must end exactly two connections"
        );
        say(&channel, ms(2_000))
            .await
            .expect("the shared connection must be dialled again");
    }
}

/// Metadata below the announced limit are sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metadata_below_the_limit_are_sent() {
    let peers = limited(1, true, CALM).await;
    let channel = over(BalancedChannel::builder(), &addresses(&peers)).await;
    let mut request = hello();
    let value = "x".repeat(7_000);
    request
        .metadata_mut()
        .insert("x-large", value.parse().unwrap());
    send(&channel, request)
        .await
        .expect("7 000 bytes must be accepted below a limit of 8 192");
    say(&channel, ms(1_000))
        .await
        .expect("the next call must be accepted");
    assert_eq!(peers[0].connections(), 1);
}

/// Like nginx and haproxy, the server announces no limit. It ends the connection of an oversized call, and serves the next call.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lone_server_that_ends_the_connection_serves_the_next_call() {
    for beyond in [CALM, Beyond::Drop] {
        let peers = limited(1, false, beyond).await;
        let channel = over(BalancedChannel::builder(), &addresses(&peers)).await;
        for _ in 0..3 {
            let status = poisoned(&channel, 120_032).await;
            assert_ne!(
                status.code(),
                Code::DeadlineExceeded,
                "{beyond:?}: {status:?}"
            );
            let mut next = Err(status);
            // The first of these calls may fail while the channel dials again.
            for _ in 0..2 {
                next = say(&channel, ms(2_000)).await;
            }
            next.expect("the next small call must be served");
        }
        let killed = oversized(&peers);
        assert!(
            killed <= 6,
            "{beyond:?}: three calls must end at most six connections, not {killed}"
        );
    }
}

const LIMIT: u32 = 8_192;
const BYSTANDERS: usize = 8;
