//! What is logged of a bad value. In a process of its own: a subscriber for one thread misses events while other tests' threads
//! register the same call sites without one.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use support::{client, etcd, eventually, knows, registry};

/// Collects what is logged.
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
async fn a_garbage_value_is_one_log_line_that_does_not_show_it() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    // The tasks of this test run on this thread.
    let _guard = tracing::subscriber::set_default(subscriber);
    let mut etcd = etcd().await;
    client(&etcd)
        .await
        .put("/gRPC/greeter/1", "password=secret", None)
        .await
        .unwrap();
    let resolver = registry(&etcd).await.resolver("greeter");
    eventually("it is counted", async || {
        resolver.status().rejected_values == 1
    })
    .await;
    // Listed again it is the same write.
    etcd.kill(0).await.unwrap();
    etcd.restart(0).await.unwrap();
    let lists = resolver.status().lists;
    client(&etcd)
        .await
        .put("/gRPC/greeter/2", "127.0.0.1:1", None)
        .await
        .unwrap();
    knows(&resolver, &["127.0.0.1:1"]).await;
    assert!(resolver.status().lists >= lists);
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
}
