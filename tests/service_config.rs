//! The service config of a service in etcd: one put changes running clients, a value that cannot be used changes nothing, and a deletion
//! restores the options of the program.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod support;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use support::greeter::greeter_client::GreeterClient;
use support::greeter::greeter_server::{Greeter, GreeterServer};
use support::greeter::{HelloReply, HelloRequest};
use support::roles::{protect, user};
use support::{Registered, SOON, World, all_ready, client, etcd, eventually, soak, within};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::Stream;
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_etcd::channel::{BalancedChannelExt, EndpointState, ServedBy, ServiceConfigMode};
use tonic_etcd::instance::Revision;
use tonic_etcd::resolver::ServiceConfigStatus;
use tonic_etcd::{BalancedChannel, Registry, RetryPolicy};

const PREFIX: &str = "/gRPC.control/";
const KEY: &str = "/gRPC.control/greeter/config";

/// A greeter whose response depends on the name in the request.
#[derive(Clone, Default)]
struct Scripted {
    calls: Arc<AtomicUsize>,
}

/// Fails every call.
const DOWN: &str = "down";
/// Responds after this time, so that a shorter timeout ends the call.
const SLOW: &str = "slow";
const SLOW_TIME: Duration = Duration::from_millis(400);

#[tonic::async_trait]
impl Greeter for Scripted {
    async fn say_hello(
        &self,
        request: Request<HelloRequest>,
    ) -> Result<Response<HelloReply>, Status> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let message = request.into_inner().name;
        match message.as_str() {
            DOWN => return Err(Status::unavailable("down for a test")),
            SLOW => sleep(SLOW_TIME).await,
            _ => {}
        }
        Ok(Response::new(HelloReply { message }))
    }

    type SayHellosStream = std::pin::Pin<Box<dyn Stream<Item = Result<HelloReply, Status>> + Send>>;

    async fn say_hellos(
        &self,
        _: Request<HelloRequest>,
    ) -> Result<Response<Self::SayHellosStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn greet_all(
        &self,
        _: Request<Streaming<HelloRequest>>,
    ) -> Result<Response<HelloReply>, Status> {
        Err(Status::unimplemented(""))
    }

    type ChatStream = Self::SayHellosStream;

    async fn chat(
        &self,
        _: Request<Streaming<HelloRequest>>,
    ) -> Result<Response<Self::ChatStream>, Status> {
        Err(Status::unimplemented(""))
    }
}

/// Two servers, of which one has a larger weight, and an operator.
struct Scene {
    world: World,
    etcd: etcd_client::Client,
    calls: Arc<AtomicUsize>,
    _servers: Vec<Registered>,
}

impl Scene {
    async fn new() -> Self {
        let world = World::new().await;
        let etcd = client(&world.etcd).await;
        let greeter = Scripted::default();
        let mut servers = Vec::new();
        for _ in 0..2 {
            let router = Server::builder().add_service(GreeterServer::new(greeter.clone()));
            servers.push(Registered::serve(
                router,
                "127.0.0.1:0",
                world.registration(),
            ));
        }
        world.counts(2).await;
        Self {
            world,
            etcd,
            calls: greeter.calls,
            _servers: servers,
        }
    }

    async fn put(&self, value: &str) -> i64 {
        let put = self.etcd.kv_client().put(KEY, value, None).await;
        put.unwrap().take_header().unwrap().revision()
    }

    async fn delete(&self) {
        self.etcd.kv_client().delete(KEY, None).await.unwrap();
    }

    /// Returns the number of attempts of a call that fails.
    async fn attempts(&self, channel: &BalancedChannel) -> usize {
        loop {
            let before = self.calls.load(Ordering::Relaxed);
            let failed = call(channel, DOWN).await.unwrap_err();
            // On a busy machine, the timeout of the service config can end the call first.
            if failed.code() != Code::DeadlineExceeded {
                assert_eq!(failed.code(), Code::Unavailable);
                return self.calls.load(Ordering::Relaxed) - before;
            }
        }
    }
}

async fn call(channel: &BalancedChannel, name: &str) -> Result<String, Status> {
    let mut request = Request::new(HelloRequest {
        name: name.to_owned(),
        replies: 1,
    });
    if name != SLOW {
        // The timeout of a request takes precedence over that of the service config.
        request.set_timeout(SOON);
    }
    let response = GreeterClient::new(channel.clone())
        .say_hello(request)
        .await?;
    let served_by = response.extensions().get::<ServedBy>().unwrap();
    Ok(served_by.address().to_string())
}

fn status(channel: &BalancedChannel) -> ServiceConfigStatus {
    channel.status().unwrap().service_config.unwrap()
}

/// Waits until a channel has applied the service config of this revision, or none.
async fn applies(channel: &BalancedChannel, revision: Option<i64>) {
    let what = format!("the service config {revision:?} applies");
    eventually(&what, async || {
        status(channel).revision.map(Revision::get) == revision
    })
    .await;
}

async fn has_timeout(channel: &BalancedChannel) -> bool {
    let slow = call(channel, SLOW).await;
    slow.is_err_and(|status| status.code() == Code::DeadlineExceeded)
}

/// Returns whether the channel sends its calls to both servers in turn, as only round robin does for 12 calls.
async fn takes_turns(channel: &BalancedChannel) -> bool {
    let mut servers = Vec::new();
    for _ in 0..12 {
        servers.push(call(channel, "anyone").await.unwrap());
    }
    servers.windows(2).all(|pair| pair[0] != pair[1])
}

const CONFIG: &str = r#"{
    "methodConfig": [{
        "name": [{"service": "helloworld.Greeter"}],
        "timeout": "0.2s",
        "retryPolicy": {
            "maxAttempts": 3, "initialBackoff": "0.001s", "maxBackoff": "0.002s", "backoffMultiplier": 1,
            "retryableStatusCodes": ["UNAVAILABLE"]
        }
    }],
    "loadBalancingConfig": [{"unheard_of": {}}, {"round_robin": {}}]
}"#;

/// Returns when each endpoint of each channel has entered its state. A lost or replaced connection changes this time.
fn connections(channels: &[BalancedChannel]) -> Vec<(String, EndpointState, Instant)> {
    let endpoints = channels.iter().flat_map(BalancedChannel::endpoints);
    let states =
        endpoints.map(|endpoint| (endpoint.address.to_string(), endpoint.state, endpoint.since));
    states.collect()
}

/// The number of clients. Each is a program of its own in practice, so each has its own connection to etcd.
const CLIENTS: usize = 50;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_put_changes_fifty_running_clients_within_a_second() {
    let scene = Scene::new().await;
    let mut channels = Vec::new();
    for _ in 0..CLIENTS {
        let registry = Registry::builder(scene.world.etcd.endpoints());
        let registry = registry
            .watch_service_configs(PREFIX)
            .connect()
            .await
            .unwrap();
        let channel = registry.channel("greeter").connect().await.unwrap();
        all_ready(&channel, 2).await;
        channels.push(channel);
    }
    // A client reads the key only after its watch is open.
    let empty = scene.put("{}").await;
    for channel in &channels {
        applies(channel, Some(empty)).await;
    }
    let first = &channels[0];
    assert_eq!(scene.attempts(first).await, 1);
    assert!(!has_timeout(first).await && !takes_turns(first).await);
    let before = connections(&channels);

    // Each client makes one call after another, until one of them ends at the new timeout.
    let mut callers = JoinSet::new();
    for channel in channels.clone() {
        callers.spawn(async move {
            while !has_timeout(&channel).await {}
            Instant::now()
        });
    }
    let put_at = Instant::now();
    let revision = scene.put(CONFIG).await;
    let ends = timeout(SOON, callers.join_all()).await.unwrap();
    let slowest = ends.into_iter().max().unwrap() - put_at;
    println!("{CLIENTS} clients had the new timeout within {slowest:?}");
    // The time contains a call of 0.4 s that was made before. On a quiet machine it is 0.65 s; the bound allows for a busy one.
    assert!(slowest <= Duration::from_millis(1_400), "{slowest:?}");
    for channel in &channels {
        assert_eq!(status(channel).revision.unwrap().get(), revision);
        assert_eq!(scene.attempts(channel).await, 3);
        assert!(takes_turns(channel).await);
    }
    assert_eq!(connections(&channels), before, "a connection was replaced");

    // A bad value changes nothing, and each client reports it.
    let bad = scene
        .put(r#"{"methodConfig": [{"name": [{}], "timeout": "soon"}]}"#)
        .await;
    for channel in &channels {
        eventually("the bad value is reported", async || {
            status(channel).rejected == 1
        })
        .await;
        let status = status(channel);
        assert_eq!(status.revision.unwrap().get(), revision);
        let error = status.last_error.unwrap();
        let expected = format!("revision {bad}: methodConfig[0].timeout: expected a duration");
        assert!(error.starts_with(&expected), "{error}");
    }
    assert_eq!(scene.attempts(first).await, 3);
    assert!(has_timeout(first).await && takes_turns(first).await);

    // The deletion restores the options of the programs.
    scene.delete().await;
    for channel in &channels {
        applies(channel, None).await;
        assert_eq!(status(channel).last_error, None);
        eventually("calls are not retried", async || {
            scene.attempts(channel).await == 1
        })
        .await;
    }
    assert!(!has_timeout(first).await);
    eventually("the policy is restored", async || !takes_turns(first).await).await;
    assert_eq!(connections(&channels), before, "a connection was replaced");
}

/// Returns a service config that sends this share of the calls to version 1.2.
fn canary(share: usize) -> String {
    let rest = 100 - share;
    format!(
        r#"{{"loadBalancingConfig": [{{"split_experimental": {{"split": [
            {{"label": {{"version": "1.2"}}, "weight": {share}}}, {{"label": {{"version": "1.1"}}, "weight": {rest}}}
        ]}}}}]}}"#
    )
}

/// 16 callers make calls all the time. A call is counted with the share that was in force when it began, unless the share has changed since.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_put_changes_the_share_of_a_version_while_calls_run() {
    let world = World::new().await;
    let etcd = client(&world.etcd).await;
    let put = async |share| {
        let put = etcd.kv_client().put(KEY, canary(share), None).await;
        put.unwrap().take_header().unwrap().revision()
    };
    let mut servers = Vec::new();
    for version in ["1.1", "1.2"] {
        let router = Server::builder().add_service(GreeterServer::new(Scripted::default()));
        let registration = world.registration().version(version);
        servers.push(Registered::serve(router, "127.0.0.1:0", registration));
    }
    world.counts(2).await;
    let channel = world.registry.channel("greeter").seed(7);
    let channel = channel.map_source(|resolver| resolver.watch_service_config(PREFIX));
    let channel = channel.connect().await.unwrap();
    all_ready(&channel, 2).await;
    applies(&channel, Some(put(5).await)).await;
    let instances = world.resolver.instances();
    let new = instances
        .iter()
        .find(|instance| instance.version() == Some("1.2"));
    let new = new.unwrap().address().to_string();

    let (phase, is_over) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let counts: Arc<[[AtomicUsize; 2]; 3]> = Arc::default();
    let mut callers = JoinSet::new();
    for _ in 0..16 {
        let (channel, new, counts) = (channel.clone(), new.clone(), Arc::clone(&counts));
        let (phase, is_over) = (Arc::clone(&phase), Arc::clone(&is_over));
        callers.spawn(async move {
            while is_over.load(Ordering::SeqCst) == 0 {
                let before = phase.load(Ordering::SeqCst);
                let served_by = call(&channel, "anyone").await.unwrap();
                if phase.load(Ordering::SeqCst) == before {
                    let version = usize::from(served_by == new);
                    counts[before][version].fetch_add(1, Ordering::SeqCst);
                }
            }
        });
    }
    let total = |phase: usize| {
        let [old, new] = &counts[phase];
        old.load(Ordering::SeqCst) + new.load(Ordering::SeqCst)
    };
    let share = |phase: usize| {
        let new = counts[phase][1].load(Ordering::SeqCst);
        f64::from(u32::try_from(new).unwrap()) / f64::from(u32::try_from(total(phase)).unwrap())
    };
    let (calls, tolerance) = soak(
        "calls, and tolerance of a share of 5 %",
        (8_000, 0.01),
        (20_000, 0.005),
    );
    let bound = Duration::from_secs(60);
    within(bound, "the calls were made", async || total(0) >= calls).await;
    // The calls until the new config applies are counted in the second phase, which has no expected share.
    phase.store(1, Ordering::SeqCst);
    applies(&channel, Some(put(50).await)).await;
    phase.store(2, Ordering::SeqCst);
    within(bound, "the calls were made", async || total(2) >= 3_000).await;
    is_over.store(1, Ordering::SeqCst);
    // A failed call panics.
    callers.join_all().await;
    let (before, after) = (share(0), share(2));
    println!(
        "{before:.4} of {} calls, then {after:.3} of {} calls",
        total(0),
        total(2)
    );
    // Four standard deviations of 8 000 calls.
    assert!((before - 0.05).abs() <= tolerance, "{before}");
    assert!((after - 0.5).abs() < 0.04, "{after}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_mode_decides_between_the_options_of_the_program_and_the_service_config() {
    let scene = Scene::new().await;
    let builder = || {
        let channel = scene.world.registry.channel("greeter");
        channel.map_source(|resolver| resolver.watch_service_config(PREFIX))
    };
    let once = || RetryPolicy::new([Code::Unavailable]).max_attempts(2);
    let revision = scene.put(CONFIG).await;
    let mut attempts = HashMap::new();
    for mode in [
        ServiceConfigMode::Prefer,
        ServiceConfigMode::Defaults,
        ServiceConfigMode::Ignore,
    ] {
        let channel = builder()
            .retry(once().initial_backoff(Duration::from_millis(1)))
            .service_config_mode(mode)
            .connect()
            .await
            .unwrap();
        applies(&channel, Some(revision)).await;
        all_ready(&channel, 2).await;
        // The options of the program set no timeout, so the timeout of the service config applies in two of the modes.
        let expected = mode != ServiceConfigMode::Ignore;
        eventually("the timeout follows the mode", async || {
            has_timeout(&channel).await == expected
        })
        .await;
        attempts.insert(mode, scene.attempts(&channel).await);
    }
    assert_eq!(attempts[&ServiceConfigMode::Prefer], 3);
    assert_eq!(attempts[&ServiceConfigMode::Defaults], 2);
    assert_eq!(attempts[&ServiceConfigMode::Ignore], 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_config_survives_an_outage_of_etcd_and_follows_a_change_after_it() {
    let mut scene = Scene::new().await;
    let channel = scene.world.registry.channel("greeter");
    let channel = channel
        .map_source(|resolver| resolver.watch_service_config(PREFIX))
        .connect()
        .await
        .unwrap();
    let revision = scene.put(CONFIG).await;
    applies(&channel, Some(revision)).await;
    scene.world.etcd.kill(0).await.unwrap();
    eventually("the outage is reported", async || {
        status(&channel).last_error.is_some()
    })
    .await;
    assert!(has_timeout(&channel).await);
    assert_eq!(scene.attempts(&channel).await, 3);
    scene.world.etcd.restart(0).await.unwrap();
    let other = r#"{"healthCheckConfig": {}}"#;
    eventually("etcd accepts a put", async || {
        scene.etcd.kv_client().put(KEY, other, None).await.is_ok()
    })
    .await;
    eventually("the new service config applies", async || {
        let config = status(&channel).config;
        config.is_some_and(|config| config.as_json() == other)
    })
    .await;
    eventually("calls are not retried", async || {
        scene.attempts(&channel).await == 1
    })
    .await;
}

/// Returns a channel of a program that starts now and has a cache.
fn starts_with_cache(scene: &Scene, folder: &Path) -> BalancedChannel {
    let registry = Registry::builder(scene.world.etcd.endpoints());
    let registry = registry.connect_lazy().unwrap();
    let channel = registry.channel("greeter").map_source(|resolver| {
        resolver
            .watch_service_config(PREFIX)
            .cache_dir(folder.to_owned())
    });
    channel.connect_lazy()
}

/// The cache file of the service config is the only one whose name ends with `.config.json`.
fn config_file(folder: &Path) -> Option<PathBuf> {
    let files = std::fs::read_dir(folder).ok()?;
    let mut paths = files.map(|file| file.unwrap().path());
    paths.find(|path| path.to_string_lossy().ends_with(".config.json"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_without_etcd_uses_the_cached_service_config_until_etcd_answers() {
    let mut scene = Scene::new().await;
    let folder = tempfile::tempdir().unwrap();
    let revision = scene.put(CONFIG).await;
    let first = starts_with_cache(&scene, folder.path());
    applies(&first, Some(revision)).await;
    eventually("the caches are written", async || {
        config_file(folder.path()).is_some() && std::fs::read_dir(&folder).unwrap().count() == 2
    })
    .await;
    drop(first);

    // Without etcd, the timeout, the retries and the policy of the cache are in force.
    scene.world.etcd.kill(0).await.unwrap();
    let offline = starts_with_cache(&scene, folder.path());
    applies(&offline, Some(revision)).await;
    assert!(status(&offline).stale);
    assert!(has_timeout(&offline).await);
    assert_eq!(scene.attempts(&offline).await, 3);
    all_ready(&offline, 2).await;
    assert!(takes_turns(&offline).await);

    // etcd still has the same value.
    scene.world.etcd.restart(0).await.unwrap();
    eventually("etcd reports the value", async || !status(&offline).stale).await;
    assert_eq!(status(&offline).revision.map(Revision::get), Some(revision));
    assert!(has_timeout(&offline).await);
    drop(offline);

    // The key is deleted while no program with the cache runs.
    let file = config_file(folder.path()).unwrap();
    let good = std::fs::read(&file).unwrap();
    eventually("the key is deleted", async || {
        scene.etcd.kv_client().delete(KEY, None).await.is_ok()
    })
    .await;
    scene.world.etcd.kill(0).await.unwrap();
    let outdated = starts_with_cache(&scene, folder.path());
    applies(&outdated, Some(revision)).await;
    assert!(status(&outdated).stale);
    scene.world.etcd.restart(0).await.unwrap();
    applies(&outdated, None).await;
    assert!(!status(&outdated).stale);
    eventually("the options of the program apply", async || {
        scene.attempts(&outdated).await == 1
    })
    .await;
    eventually("the file is removed", async || {
        config_file(folder.path()).is_none()
    })
    .await;
    drop(outdated);

    // A damaged file is ignored, and the instances of the other file are used.
    scene.world.etcd.kill(0).await.unwrap();
    std::fs::write(&file, &good[..good.len() / 2]).unwrap();
    let damaged = starts_with_cache(&scene, folder.path());
    all_ready(&damaged, 2).await;
    assert_eq!(scene.attempts(&damaged).await, 1);
    assert_eq!(status(&damaged).config, None);
}

/// The roles of earlier versions have no permission for the control prefix.
#[tokio::test]
async fn a_client_that_may_not_read_the_service_config_uses_its_own_options() {
    let etcd = etcd().await;
    let mut kv = client(&etcd).await.kv_client();
    kv.put(KEY, CONFIG, None).await.unwrap();
    protect(&etcd).await;
    let writer = user(&etcd, "writer").await.unwrap();
    let router = Server::builder().add_service(GreeterServer::new(Scripted::default()));
    let registration = writer.registration("greeter");
    let _server = Registered::serve(router, "127.0.0.1:0", registration);
    let reader = user(&etcd, "reader").await.unwrap();
    let channel = reader
        .channel("greeter")
        .map_source(|resolver| resolver.watch_service_config(PREFIX))
        .wait_for_ready(true)
        .connect()
        .await
        .unwrap();
    eventually("the missing permission is reported", async || {
        let error = status(&channel).last_error;
        error.is_some_and(|error| error.contains("permission denied"))
    })
    .await;
    assert!(!has_timeout(&channel).await);
    assert_eq!(status(&channel).revision, None);
    assert!(
        channel
            .status()
            .unwrap()
            .to_string()
            .contains("service config: none, last error: ")
    );
}

#[tokio::test]
async fn a_control_prefix_below_the_instances_is_not_watched() {
    let world = World::new().await;
    let resolver = world.registry.resolver("greeter");
    let resolver = resolver.watch_service_config("/gRPC").start();
    assert_eq!(resolver.service_config(), None);
    let prefixes = world.registry.resolver_at(["/gRPC/greeter"]);
    let prefixes = prefixes.watch_service_config(PREFIX).start();
    assert_eq!(prefixes.service_config(), None);
}
