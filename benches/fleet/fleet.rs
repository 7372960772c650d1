//! The fleet: many clients and servers, each with a registry of its own, as if each were a separate process.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tonic_etcd::resolver::ResolverState;
use tonic_etcd::{Registration, Registry, Resolver};

use super::Result;
use super::world::{World, put};

/// The service of the fleet. The users that [`super::roles`] creates have permissions for its keys.
pub const SERVICE: &str = "greeter";

/// The options of all registries.
#[derive(Clone, Debug)]
struct Plan {
    endpoints: Vec<String>,
    protected: bool,
    ttl: Option<Duration>,
    /// Limits the number of registries that connect at the same time. With passwords, each connect costs etcd one password hash.
    connecting: Arc<Semaphore>,
}

/// One client: a registry, and a resolver of the service.
#[derive(Debug)]
struct Client {
    resolver: Resolver,
    _registry: Registry,
}

/// One server: a registry, and a registration of the service.
#[derive(Debug)]
struct Server {
    registration: Registration,
    _registry: Registry,
}

#[derive(Debug)]
pub struct Fleet {
    plan: Plan,
    clients: Vec<Client>,
    servers: Vec<Server>,
    /// Number of addresses that were used so far.
    addresses: u32,
    /// Addresses of the instances that the operator (an etcd client outside the fleet) wrote. A client whose set contains the last of these
    /// addresses has received all earlier changes.
    canaries: Vec<String>,
}

/// The times after which half of the clients and servers, and all of them, were right. [`Fleet::right`] defines *right*.
#[derive(Clone, Copy, Debug)]
pub struct Right {
    pub half: Duration,
    pub all: Duration,
}

impl Fleet {
    pub fn new(world: &World, ttl: Option<Duration>) -> Self {
        let connecting = if world.protected {
            2
        } else {
            Semaphore::MAX_PERMITS
        };
        Self {
            plan: Plan {
                endpoints: world.etcd.endpoints(),
                protected: world.protected,
                ttl,
                connecting: Arc::new(Semaphore::new(connecting)),
            },
            clients: Vec::new(),
            servers: Vec::new(),
            addresses: 0,
            canaries: Vec::new(),
        }
    }

    pub fn clients(&self) -> usize {
        self.clients.len()
    }

    pub fn servers(&self) -> usize {
        self.servers.len()
    }

    /// Returns the number of complete lists that all clients together have made.
    pub fn lists(&self) -> u64 {
        self.clients
            .iter()
            .map(|client| client.resolver.status().lists)
            .sum()
    }

    /// Starts servers, all at once.
    pub async fn start_servers(&mut self, count: usize) -> Result<()> {
        let mut starting = JoinSet::new();
        for _ in 0..count {
            starting.spawn(start_server(self.plan.clone(), self.next_address()));
        }
        while let Some(server) = starting.join_next().await {
            self.servers.push(joined(server)?);
        }
        Ok(())
    }

    /// Starts clients, all at once.
    pub async fn start_clients(&mut self, count: usize) -> Result<()> {
        let mut starting = JoinSet::new();
        for _ in 0..count {
            starting.spawn(start_client(self.plan.clone()));
        }
        while let Some(client) = starting.join_next().await {
            self.clients.push(joined(client)?);
        }
        Ok(())
    }

    /// Replaces one server with a new server at another address. The new server is registered before the old server is deregistered.
    pub async fn replace_server(&mut self, index: usize) -> Result<()> {
        let address = self.next_address();
        let server = start_server(self.plan.clone(), address).await?;
        let old = std::mem::replace(&mut self.servers[index], server);
        let key = old.registration.key().to_owned();
        let deregistered = old.registration.deregister().await;
        deregistered.map_err(|error| format!("deregister {key}: {error}"))
    }

    /// Replaces one client with a new client.
    pub async fn replace_client(&mut self, index: usize) -> Result<()> {
        self.clients[index] = start_client(self.plan.clone()).await?;
        Ok(())
    }

    /// Writes a new instance, the canary. A client is right only if its set contains the canary.
    pub async fn write_canary(&mut self, operator: &etcd_client::Client) -> Result<()> {
        let address = self.next_address();
        let key = format!("/gRPC/{SERVICE}/{address}");
        put(operator, &key, &address).await?;
        self.canaries.push(address);
        Ok(())
    }

    /// Returns the address of the last canary.
    pub fn canary(&self) -> &str {
        self.canaries.last().map_or("", String::as_str)
    }

    /// Records that etcd has lost its data, and with it the keys of the operator.
    pub fn on_wiped(&mut self) {
        self.canaries.clear();
    }

    /// Waits until all clients and servers are right. A client is right if its set is [fresh](ResolverState::Fresh) and consists of exactly
    /// the servers and the canaries. A server is right if it is registered. Returns the times since `start`.
    pub async fn right(&self, start: Instant, limit: Duration) -> Result<Right> {
        let servers = self
            .servers
            .iter()
            .map(|server| server.registration.address().to_string());
        let expected: HashSet<_> = servers.chain(self.canaries.iter().cloned()).collect();
        let all = || {
            let clients = self.clients.iter().map(|client| client as &dyn Participant);
            let servers = self.servers.iter().map(|server| server as &dyn Participant);
            clients.chain(servers).enumerate().collect::<Vec<_>>()
        };
        let mut wrong = all();
        let mut times = vec![Duration::ZERO; wrong.len()];
        loop {
            let since = Instant::now().saturating_duration_since(start);
            wrong.retain(|(index, member)| {
                let is_wrong = member.fault(&expected).is_some();
                if !is_wrong {
                    times[*index] = since;
                }
                is_wrong
            });
            if wrong.is_empty() {
                // A client or server that was right at an earlier check may be wrong by now.
                wrong = all();
                wrong.retain(|(_, member)| member.fault(&expected).is_some());
                if wrong.is_empty() {
                    times.sort_unstable();
                    return Ok(Right {
                        half: times[times.len() / 2],
                        all: since,
                    });
                }
            }
            if since > limit {
                let fault = wrong
                    .first()
                    .and_then(|(_, member)| member.fault(&expected));
                let (left, all) = (wrong.len(), times.len());
                return Err(format!(
                    "{left} of {all} are wrong after {limit:?}, the first: {}",
                    fault.unwrap_or_default()
                ));
            }
            sleep(POLL).await;
        }
    }

    fn next_address(&mut self) -> String {
        let [_, b, c, d] = self.addresses.to_be_bytes();
        self.addresses += 1;
        format!("10.{b}.{c}.{d}:50051")
    }
}

/// A client or a server.
trait Participant {
    /// Returns the reason why the participant is wrong, or `None` if it is right.
    fn fault(&self, expected: &HashSet<String>) -> Option<String>;
}

impl Participant for Client {
    fn fault(&self, expected: &HashSet<String>) -> Option<String> {
        let status = self.resolver.status();
        if status.state != ResolverState::Fresh {
            return Some(format!(
                "a client is {:?}: {:?}",
                status.state, status.last_error
            ));
        }
        let instances = self.resolver.instances();
        let right = instances.iter().filter(|instance| {
            !instance.is_last_resort() && expected.contains(instance.address().as_str())
        });
        let right = right.count();
        let is_right = right == expected.len() && instances.len() == right;
        (!is_right).then(|| {
            format!(
                "a client has {right} of {} instances, and {} others",
                expected.len(),
                instances.len() - right
            )
        })
    }
}

impl Participant for Server {
    fn fault(&self, _: &HashSet<String>) -> Option<String> {
        let state = self.registration.state();
        (!state.is_registered()).then(|| format!("{} is {state:?}", self.registration.key()))
    }
}

async fn start_client(plan: Plan) -> Result<Client> {
    let registry = connect(&plan, "reader").await?;
    let resolver = registry.resolver(SERVICE).start();
    let ready = timeout(PATIENCE, resolver.ready()).await;
    ready.map_err(|_| {
        format!(
            "no list of {SERVICE} in {PATIENCE:?}: {:?}",
            resolver.status().last_error
        )
    })?;
    Ok(Client {
        resolver,
        _registry: registry,
    })
}

async fn start_server(plan: Plan, address: String) -> Result<Server> {
    let registry = connect(&plan, "writer").await?;
    let mut registration = registry.registration(SERVICE).address(address.as_str());
    if let Some(ttl) = plan.ttl {
        registration = registration.ttl(ttl);
    }
    let registration = registration.startup_timeout(PATIENCE).register().await;
    Ok(Server {
        registration: registration.map_err(|error| format!("register {address}: {error}"))?,
        _registry: registry,
    })
}

async fn connect(plan: &Plan, user: &str) -> Result<Registry> {
    let _permit = plan.connecting.acquire().await;
    let builder = Registry::builder(plan.endpoints.clone());
    let builder = if plan.protected {
        builder.user(user, format!("{user}-password"))
    } else {
        builder
    };
    let registry = builder.connect().await;
    registry.map_err(|error| format!("connect a registry: {error}"))
}

fn joined<T>(outcome: std::result::Result<Result<T>, tokio::task::JoinError>) -> Result<T> {
    outcome.map_err(|error| format!("a task of the fleet has ended: {error}"))?
}

const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);
