//! Contents of errors: the cause, the endpoint, and the mistake in a name or an address.

use std::error::Error;

use tonic::{Code, Status};
use tonic_etcd::{BalancedChannel, error::CallError};

use super::support::greeter::with_causes;
use super::support::peer::{Answer, Peer};
use super::support::{etcd, registry, within};
use super::{addresses, lazily, ms, over, retrying, say};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_error_of_an_unready_channel_is_one_line_with_the_cause() {
    let channel = lazily(BalancedChannel::builder(), &["127.0.0.1:1".to_owned()]);
    let error = channel
        .wait_until_ready()
        .await
        .expect_err("a channel without a server must not become ready");
    let line = error.to_string();
    println!("{line}");
    for part in ["greeter", "127.0.0.1:1", "refused"] {
        assert!(
            line.contains(part),
            "{part:?} is missing in the Display: {line}"
        );
    }
    assert!(!line.contains('\n'), "the message must be one line: {line}");
}

#[cfg(feature = "tls")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn different_causes_have_different_messages() {
    use super::support::peer::Manner;
    use super::support::tls::Localhost;
    let localhost = Localhost::new();
    let stranger = Localhost::new();
    let tls = Peer::with_tls(Manner::default(), &localhost).await;
    let plain = Peer::good().await;
    let builder = || BalancedChannel::builder().connect_timeout(ms(1_000));
    let wrong_name = tonic_etcd::TlsConfig::new("other.example").ca_certificate(localhost.ca());
    let no_file = tonic_etcd::TlsConfig::new("localhost").ca_certificate_file("/nowhere/ca.pem");
    let mut lines = Vec::new();
    for (what, channel) in [
        ("plaintext to TLS", lazily(builder(), &addresses([&tls]))),
        (
            "TLS to plaintext",
            lazily(
                builder().tls_config(localhost.trusted()),
                &addresses([&plain]),
            ),
        ),
        (
            "unknown authority",
            lazily(builder().tls_config(stranger.trusted()), &addresses([&tls])),
        ),
        (
            "wrong name",
            lazily(builder().tls_config(wrong_name), &addresses([&tls])),
        ),
        (
            "missing file",
            lazily(builder().tls_config(no_file), &addresses([&tls])),
        ),
        (
            "closed port",
            lazily(builder(), &["127.0.0.1:1".to_owned()]),
        ),
    ] {
        let error = channel.wait_until_ready().await.expect_err(what);
        let line = error.to_string();
        println!("{what}: {line}");
        lines.push(line);
    }
    // Ports always differ, so digits are removed before the comparison.
    let causes: std::collections::BTreeSet<_> = lines
        .iter()
        .map(|line| line.replace(|c: char| c.is_ascii_digit(), ""))
        .collect();
    assert_eq!(
        causes.len(),
        lines.len(),
        "each cause must have its own text: {lines:#?}"
    );
}

/// Returns the texts of all causes of a status.
fn chain(status: &Status) -> Vec<String> {
    let first = Error::source(status);
    let causes = std::iter::successors(first, |error| (*error).source());
    causes.map(ToString::to_string).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_status_keeps_its_message_and_has_the_server_in_its_source_chain() {
    for builder in [
        BalancedChannel::builder as fn() -> tonic_etcd::channel::ChannelBuilder,
        retrying,
    ] {
        let peer = Peer::answering(Answer::Fail(Code::NotFound)).await;
        let channel = over(builder(), &addresses([&peer])).await;
        let status = say(&channel, ms(2_000))
            .await
            .expect_err("the call must fail with the status of the server");
        assert_eq!(status.code(), Code::NotFound);
        assert_eq!(
            status.message(),
            "as told",
            "the message of the server must be unchanged"
        );
        let causes = chain(&status);
        println!("{causes:?}");
        assert!(
            causes
                .iter()
                .any(|cause| cause.contains(&peer.address.to_string())),
            "the endpoint must be in the source chain: {causes:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_failed_by_its_connection_has_the_endpoint_in_its_source_chain() {
    let peer = Peer::answering(Answer::Cancel(ms(10))).await;
    let channel = over(BalancedChannel::builder(), &addresses([&peer])).await;
    let status = say(&channel, ms(2_000))
        .await
        .expect_err("a call that the server resets must fail");
    let causes = chain(&status);
    assert!(
        causes
            .iter()
            .any(|cause| cause.contains(&peer.address.to_string())),
        "the endpoint must be in the source chain: {causes:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_call_can_be_downcast_to_a_call_error() {
    for answer in [
        Answer::Fail(Code::NotFound),
        Answer::Cancel(ms(10)),
        Answer::html(503),
        Answer::NoTrailers,
    ] {
        let peer = Peer::answering(answer).await;
        let channel = over(BalancedChannel::builder(), &addresses([&peer])).await;
        let status = say(&channel, ms(2_000))
            .await
            .expect_err("the call must fail");
        let causes = std::iter::successors(Error::source(&status), |error| (*error).source());
        let mut found = causes.filter_map(|error| error.downcast_ref::<CallError>());
        let found = found.next();
        let found =
            found.unwrap_or_else(|| panic!("{answer:?}: no CallError in the chain of {status:?}"));
        assert_eq!(
            found.address().as_str(),
            peer.address.to_string(),
            "{answer:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_name_with_a_slash_is_not_reported_as_an_etcd_outage() {
    let etcd = etcd().await;
    let registry = registry(&etcd).await;
    let builder = registry.channel("team/greeter").startup_timeout(ms(1_000));
    let connected = tokio::time::timeout(ms(5_000), builder.connect()).await;
    let error = connected
        .expect("`connect` must return at once")
        .expect_err("a service name with a slash must be rejected");
    let text = with_causes(&error);
    println!("connect: {text}");
    assert!(
        text.contains('/') && text.contains("slash"),
        "the error must name the slash: {text}"
    );
    assert!(
        !text.contains("is unavailable"),
        "the error must not report an outage of etcd: {text}"
    );

    let lazy = registry
        .channel("team/greeter")
        .startup_timeout(ms(500))
        .connect_lazy();
    let status = say(&lazy, ms(3_000))
        .await
        .expect_err("a service name with a slash must fail the call");
    println!("call: {status:?}");
    assert!(
        status.message().contains("slash"),
        "the error must name the slash: {status:?}"
    );
    assert!(
        !status.message().contains("is unavailable"),
        "the error must not report an outage of etcd: {status:?}"
    );

    let resolver = registry.resolver("team/greeter").start();
    within(ms(5_000), "the resolver has an error", async || {
        resolver.status().last_error.is_some()
    })
    .await;
    let error = resolver.status().last_error.unwrap();
    let text = with_causes(&error);
    println!("resolver: {text}");
    assert!(
        text.contains("slash"),
        "the error must name the slash: {text}"
    );
    assert!(
        !text.contains("is unavailable"),
        "the error must not report an outage of etcd: {text}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_with_a_scheme_works_or_names_what_the_scheme_requires() {
    let peer = Peer::good().await;
    let channel = lazily(
        BalancedChannel::builder(),
        &[format!("http://{}", peer.address)],
    );
    say(&channel, ms(3_000))
        .await
        .expect("an http:// address must work in a channel without TLS");
    let channel = lazily(
        BalancedChannel::builder(),
        &[format!("https://{}", peer.address)],
    );
    let status = say(&channel, ms(3_000))
        .await
        .expect_err("an https:// address must fail in a channel without TLS");
    println!("{status:?}");
    assert!(
        status.message().contains("requires TLS"),
        "the message must name what is missing: {status:?}"
    );
}
