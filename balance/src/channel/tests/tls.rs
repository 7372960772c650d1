//! TLS: the client verifies the configured name of the server against the given roots, and reads certificate files again.

use tonic::transport::{Certificate, Identity, ServerTlsConfig};

use super::*;
use crate::TlsConfig;
use crate::channel::error::ChannelError;

#[path = "../../../../tests/support/authority.rs"]
#[allow(
    dead_code,
    clippy::unwrap_used,
    unreachable_pub,
    reason = "the integration tests use the other functions; a failed unwrap fails the test"
)]
mod authority;

use authority::Authority;

fn serve(authority: &Authority) -> Greeter {
    serve_with(authority, |tls| tls)
}

fn serve_with(
    authority: &Authority,
    configure: impl FnOnce(ServerTlsConfig) -> ServerTlsConfig,
) -> Greeter {
    let identity = Identity::from_pem(authority.read("server.pem"), authority.read("server.key"));
    let tls = configure(ServerTlsConfig::new().identity(identity));
    Greeter::start_with("secure", 0, |server| server.tls_config(tls).expect("TLS"))
}

fn secured(server: &Greeter, tls: TlsConfig) -> BalancedChannel {
    BalancedChannel::builder()
        .tls_config(tls)
        .addresses([server.address()])
        .connect_lazy()
}

#[tokio::test]
async fn the_configured_name_is_verified_against_the_given_roots() {
    let authority = Authority::new();
    authority.sign("server", "greeter.internal");
    let server = serve(&authority);
    let tls = TlsConfig::new("greeter.internal").ca_certificate(authority.read("ca.pem"));
    say(&secured(&server, tls)).await.expect("an answer");

    let tls = TlsConfig::new("other.internal").ca_certificate(authority.read("ca.pem"));
    let status = say(&secured(&server, tls)).await.expect_err("another name");
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("TLS"), "{status}");

    let stranger = Authority::new();
    let tls = TlsConfig::new("greeter.internal").ca_certificate(stranger.read("ca.pem"));
    let status = say(&secured(&server, tls))
        .await
        .expect_err("another authority");
    assert!(status.message().contains("TLS"), "{status}");
}

#[tokio::test]
async fn a_configuration_that_can_never_work_makes_the_channel_invalid() {
    let authority = Authority::new();
    authority.sign("client", "caller.internal");
    let (ca, chain) = (authority.read("ca.pem"), authority.read("client.pem"));
    let key = authority.read("client.key");
    let named = || TlsConfig::new("greeter.internal");
    for (tls, word) in [
        (TlsConfig::new("not a name"), "\"not a name\""),
        (TlsConfig::new(""), "\"\""),
        (named().ca_certificate("no certificate"), "`ca_certificate`"),
        (named().ca_certificate(key.clone()), "`ca_certificate`"),
        (named().identity("", key.clone()), "`identity`"),
        (
            named().identity(chain.clone(), chain.clone()),
            "the key of `identity`",
        ),
    ] {
        let builder = BalancedChannel::builder()
            .addresses(["127.0.0.1:1"])
            .tls_config(tls);
        let error = builder.clone().connect().await.expect_err(word);
        assert!(
            matches!(error, ChannelError::InvalidOption { .. }),
            "{error:?}"
        );
        assert!(error.to_string().contains(word), "{error}");
        let status = say(&builder.connect_lazy()).await.expect_err(word);
        assert!(status.message().contains(word), "{status}");
    }
    // The line breaks of a key from an environment variable are often lost. The error must not contain the key.
    let secret = String::from_utf8(key.clone())
        .expect("PEM")
        .replace('\n', "");
    for key in [
        secret.clone(),
        secret.replace("-----END", "\\n-----END") + "\\n",
    ] {
        let tls = named().identity(chain.clone(), key);
        let builder = BalancedChannel::builder().addresses(["127.0.0.1:1"]);
        let error = builder.tls_config(tls).connect().await.expect_err("no key");
        let text = format!("{error} {error:?}");
        assert!(text.len() < 300 && !text.contains("45, 45"), "{text}");
    }
    let files = named().ca_certificate_file("/none/ca.pem");
    for tls in [named().ca_certificate(ca).identity(chain, key), files] {
        let builder = BalancedChannel::builder().addresses(["127.0.0.1:1"]);
        let error = builder
            .tls_config(tls)
            .connect()
            .await
            .expect_err("no server");
        assert!(matches!(error, ChannelError::Unready { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn certificate_files_are_read_again() {
    let (old, new) = (Authority::new(), Authority::new());
    new.sign("server", "greeter.internal");
    let server = serve(&new);
    let file = old.path("ca.pem");
    let channel = secured(
        &server,
        TlsConfig::new("greeter.internal").ca_certificate_file(&file),
    );
    say(&channel).await.expect_err("not trusted yet");
    std::fs::write(&file, new.read("ca.pem")).expect("a file");
    ready(&channel, 1).await;
    say(&channel).await.expect("trusted without a restart");
}

#[tokio::test]
async fn the_client_certificate_is_sent_on_request() {
    let (authority, clients) = (Authority::new(), Authority::new());
    authority.sign("server", "greeter.internal");
    clients.sign("client", "caller.internal");
    let roots = Certificate::from_pem(clients.read("ca.pem"));
    let server = serve_with(&authority, |tls| tls.client_ca_root(roots));
    let tls = || TlsConfig::new("greeter.internal").ca_certificate(authority.read("ca.pem"));

    let (certificate, key) = (clients.read("client.pem"), clients.read("client.key"));
    let channel = secured(&server, tls().identity(certificate, key));
    say(&channel).await.expect("an answer");

    let status = say(&secured(&server, tls()))
        .await
        .expect_err("no client certificate");
    assert_eq!(status.code(), Code::Unavailable);
    assert!(
        status.message().contains("ertificate"),
        "the message must name the reason: {status}"
    );

    authority.sign("client", "caller.internal");
    let (certificate, key) = (authority.read("client.pem"), authority.read("client.key"));
    let stranger = secured(&server, tls().identity(certificate, key));
    let status = say(&stranger)
        .await
        .expect_err("signed by another authority");
    assert_eq!(status.code(), Code::Unavailable);
}

/// Repeats a call until it succeeds.
async fn answered(channel: &BalancedChannel) {
    while say(channel).await.is_err() {}
}

#[tokio::test]
async fn identity_files_are_read_again_and_an_incomplete_pair_is_ignored() {
    let (authority, clients) = (Authority::new(), Authority::new());
    authority.sign("server", "greeter.internal");
    let roots = Certificate::from_pem(clients.read("ca.pem"));
    let server = serve_with(&authority, |tls| tls.client_ca_root(roots));
    let file = |name| authority.path(name);
    authority.sign("client", "caller.internal");
    let tls = TlsConfig::new("greeter.internal")
        .ca_certificate_file(file("ca.pem"))
        .identity_files(file("client.pem"), file("client.key"));
    let channel = BalancedChannel::builder()
        .tls_config(tls)
        .max_backoff(Duration::from_millis(20))
        .addresses([server.address()])
        .connect_lazy();
    say(&channel)
        .await
        .expect_err("the authority is not trusted by the server");
    clients.sign("client", "caller.internal");
    for name in ["client.pem", "client.key"] {
        std::fs::write(file(name), clients.read(name)).expect("a file");
    }
    in_time("a call with the new identity", answered(&channel)).await;

    // In the middle of a renewal, the key file is missing.
    std::fs::remove_file(file("client.key")).expect("a file");
    let port = server.address.port();
    server.shut_down().await;
    let identity = Identity::from_pem(authority.read("server.pem"), authority.read("server.key"));
    let roots = Certificate::from_pem(clients.read("ca.pem"));
    let tls = ServerTlsConfig::new()
        .identity(identity)
        .client_ca_root(roots);
    let _again = Greeter::start_with("secure", port, |server| {
        server.tls_config(tls).expect("TLS")
    });
    in_time("a call with the last identity", answered(&channel)).await;
}

#[tokio::test]
async fn verify_dialled_host_is_limited_to_static_addresses() {
    let authority = Authority::new();
    authority.sign("server", "greeter.internal");
    let server = serve(&authority);
    let tls = || TlsConfig::verify_dialled_host().ca_certificate(authority.read("ca.pem"));
    // The certificate is also valid for 127.0.0.1.
    say(&secured(&server, tls())).await.expect("an answer");

    let other = server.address().replace("127.0.0.1", "localhost");
    let channel = BalancedChannel::builder()
        .tls_config(tls())
        .addresses([other])
        .connect_lazy();
    let status = say(&channel).await.expect_err("another name");
    assert!(status.message().contains("TLS"), "{status}");

    let (changes, stream) = mpsc::unbounded_channel();
    let channel = BalancedChannel::builder()
        .tls_config(tls())
        .discover(UnboundedReceiverStream::new(stream))
        .connect_lazy();
    insert(&changes, &server.address(), Attributes::new());
    let status = say(&channel).await.expect_err("an address from discovery");
    assert!(status.message().contains("TlsConfig::new"), "{status}");
}
