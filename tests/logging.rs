//! Log output for an invalid value and for a mass removal, which is the removal of most instances at once. The test runs in a process of
//! its own. Otherwise, other tests could register the same tracing call sites on threads without a subscriber, and the subscriber of this
//! thread would miss events.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use std::time::Duration;

use support::{client, etcd, eventually, knows, registry};

/// Collects the log output.
#[derive(Clone, Default)]
struct Log(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn an_invalid_value_is_logged_once_without_the_value_and_a_mass_removal_in_two_lines() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    // All tasks of this test run on this thread, so a subscriber for the thread is enough.
    let _guard = tracing::subscriber::set_default(subscriber);
    let mut etcd = etcd().await;
    client(&etcd)
        .await
        .put("/gRPC/greeter/1", "password=secret", None)
        .await
        .unwrap();
    let resolver = registry(&etcd)
        .await
        .resolver("greeter")
        .mass_removal_protection(Some(Duration::from_millis(500)))
        .start();
    eventually("the value is counted", async || {
        resolver.status().rejected_values == 1
    })
    .await;
    // Further invalid values under the same key are counted, but not logged.
    for rejected in 2..=4 {
        let mut by_hand = client(&etcd).await;
        let bad = by_hand.put("/gRPC/greeter/1", "password=secret", None);
        bad.await.unwrap();
        eventually("the value is counted", async || {
            resolver.status().rejected_values == rejected
        })
        .await;
    }
    // After a restart of etcd, the resolver may list the same value again. The value is not logged a second time.
    etcd.kill(0).await.unwrap();
    etcd.restart(0).await.unwrap();
    client(&etcd)
        .await
        .put("/gRPC/greeter/2", "127.0.0.1:1", None)
        .await
        .unwrap();
    knows(&resolver, &["127.0.0.1:1"]).await;
    let mut by_hand = client(&etcd).await;
    for number in 3..=5 {
        let key = format!("/gRPC/greeter/{number}");
        by_hand
            .put(key, format!("127.0.0.1:{number}"), None)
            .await
            .unwrap();
    }
    let options = etcd_client::DeleteOptions::new().with_prefix();
    eventually("four instances are known", async || {
        resolver.instances().len() == 4
    })
    .await;
    by_hand.delete("/gRPC/", Some(options)).await.unwrap();
    eventually(
        "two instances are held for 500 ms and then removed",
        async || resolver.status().mass_removals == 1 && resolver.instances().is_empty(),
    )
    .await;
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    let warnings: Vec<_> = text
        .lines()
        .filter(|line| line.contains("skipped"))
        .collect();
    assert!(
        matches!(&warnings[..], [line] if line.contains("/gRPC/greeter/1")),
        "{warnings:#?}"
    );
    assert!(!text.contains("secret"), "{text}");
    let warned = |words: &[&str]| {
        let all = |line: &&str| words.iter().all(|word| line.contains(word));
        text.lines()
            .filter(|line| line.contains("WARN"))
            .filter(all)
            .count()
    };
    let service = r#"service="greeter""#;
    let began = [
        service,
        "registered=0",
        "of=4",
        "kept_for=500ms",
        "as a last resort",
    ];
    assert_eq!(warned(&began), 1, "{text}");
    assert_eq!(warned(&[service, "removed=2", "are not back"]), 1, "{text}");
}
