//! The options of a registration.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::watch;
use tonic_balance::AddressPolicy;

use crate::error::RegisterError;
use crate::etcd::Etcd;
use crate::format::Format;
use crate::keyspace::Keyspace;
use crate::registration::control::{Control, ControlKeys};
use crate::registration::handle::RegistrationHandle;
use crate::registration::registration::Registration;
use crate::registration::serve_options::ServeOptions;
use crate::registration::status::RegistrationState;

/// A builder of a registration, created by [`Registry::registration`](crate::Registry::registration) and
/// [`Registry::registration_at`](crate::Registry::registration_at).
///
/// The builder checks nothing and sends nothing until [`register`](Self::register) is called, or until it is passed to a server that
/// registers itself.
///
/// A clone has the same options, but its watches and handles report only the registration of the clone.
#[derive(Debug)]
#[must_use = "nothing is registered before `register` is awaited"]
pub struct RegistrationBuilder {
    pub(super) etcd: Etcd,
    pub(super) policy: AddressPolicy,
    pub(super) target: Target,
    pub(super) instance_id: Option<String>,
    pub(super) further: Vec<String>,
    dedicated_thread: bool,
    pub(super) address: Option<String>,
    pub(super) host: Option<String>,
    pub(super) advertisement: Attributes,
    /// The prefix of the control keys. `None` disables the control by operators.
    pub(super) control_prefix: Option<String>,
    /// `None` selects the TTL by the number of servers of the service.
    pub(super) ttl: Option<Duration>,
    pub(super) format: Format,
    pub(crate) startup_timeout: Duration,
    pub(in crate::registration) deregister_timeout: Duration,
    pub(crate) serve: ServeOptions,
    pub(in crate::registration) states: watch::Sender<RegistrationState>,
}

/// The service or the exact key of the registration.
#[derive(Clone, Debug)]
pub(super) enum Target {
    Service { keyspace: Keyspace, service: String },
    Key(String),
}

#[derive(Clone, Debug)]
pub(super) struct Attributes {
    pub(super) weight: Option<u32>,
    pub(super) tls: bool,
    pub(super) zone: Option<String>,
    pub(super) version: Option<String>,
    pub(super) metadata: Vec<(String, String)>,
}

impl Clone for RegistrationBuilder {
    /// Copies the options. The copy has its own `watch` senders, because a receiver of a shared sender would see a mixture of the states of
    /// two registrations.
    fn clone(&self) -> Self {
        Self {
            etcd: self.etcd.clone(),
            policy: self.policy.clone(),
            target: self.target.clone(),
            instance_id: self.instance_id.clone(),
            further: self.further.clone(),
            dedicated_thread: self.dedicated_thread,
            address: self.address.clone(),
            host: self.host.clone(),
            advertisement: self.advertisement.clone(),
            control_prefix: self.control_prefix.clone(),
            ttl: self.ttl,
            format: self.format.clone(),
            startup_timeout: self.startup_timeout,
            deregister_timeout: self.deregister_timeout,
            serve: self.serve.clone(),
            states: new_states(),
        }
    }
}

impl RegistrationBuilder {
    pub(crate) fn service(
        etcd: Etcd,
        policy: AddressPolicy,
        keyspace: Keyspace,
        service: &str,
    ) -> Self {
        Self::new(
            etcd,
            policy,
            Target::Service {
                keyspace,
                service: service.to_owned(),
            },
        )
    }

    pub(crate) fn key(etcd: Etcd, policy: AddressPolicy, key: &str) -> Self {
        Self::new(etcd, policy, Target::Key(key.to_owned()))
    }

    fn new(etcd: Etcd, policy: AddressPolicy, target: Target) -> Self {
        Self {
            etcd,
            policy,
            target,
            instance_id: None,
            further: Vec::new(),
            dedicated_thread: false,
            address: None,
            host: None,
            advertisement: Attributes {
                weight: None,
                tls: false,
                zone: None,
                version: None,
                metadata: Vec::new(),
            },
            control_prefix: None,
            ttl: None,
            format: Format::default(),
            startup_timeout: STARTUP_TIMEOUT,
            deregister_timeout: DEREGISTER_TIMEOUT,
            serve: ServeOptions::default(),
            states: new_states(),
        }
    }

    /// Registers the server for one more service, with the same address, id, attributes and lease. Call this function once for each
    /// service.
    ///
    /// A server with many services then needs only one lease and one renewal. Changes of the registration apply to all of its services;
    /// [`Registration::deregister_service`] removes a single one. A registration at an exact key cannot have additional services.
    ///
    /// ```no_run
    /// # async fn run(registry: tonic_etcd::Registry) -> Result<(), tonic_etcd::error::RegisterError> {
    /// let registration = registry
    ///     .registration("helloworld.Greeter")
    ///     .additional_service("routeguide.RouteGuide")
    ///     .address("10.0.0.5:50051")
    ///     .register()
    ///     .await?;
    /// registration.deregister_service("routeguide.RouteGuide").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn additional_service(mut self, service: impl Into<String>) -> Self {
        self.further.push(service.into());
        self
    }

    /// Sets whether the registration runs on its own thread, with its own connections. The lease is then renewed even if calls occupy every
    /// thread of the application's runtime for longer than the TTL. Disabled by default. The option has less effect with a client passed to
    /// [`Registry::from_client`](crate::Registry::from_client), because that client keeps its connections on the runtime that created them.
    pub fn dedicated_thread(mut self, dedicated_thread: bool) -> Self {
        self.dedicated_thread = dedicated_thread;
        self
    }

    /// Sets the address that clients dial, as `host:port`, with IPv6 addresses in brackets.
    ///
    /// A server that registers itself ([`ServeRegistered`](crate::ServeRegistered)) does not need this option: it advertises the address of
    /// its listener. If that address is unspecified (`0.0.0.0`, `::`), the server advertises the local address of the route to etcd.
    pub fn address(mut self, address: impl Into<String>) -> Self {
        self.address = Some(address.into());
        self
    }

    /// Sets the host that clients dial. The port is the port of the listener. By default, the host is the IP address of the listener. If
    /// that address is unspecified, the default is the local address of the route to etcd, as for [`address`](Self::address).
    pub fn host(mut self, host: impl Into<String>) -> Self {
        self.host = Some(host.into());
        self
    }

    /// Sets the instance id, the last part of the key. The default is the address, so that a restarted server overwrites its old entry. An
    /// id is rejected for a registration at an exact key, and if the [`Format`] requires the address as the last part of the key.
    pub fn instance_id(mut self, instance_id: impl Into<String>) -> Self {
        self.instance_id = Some(instance_id.into());
        self
    }

    /// Sets the weight, 1 to 1 000 000: the share of calls relative to the weights of the other instances. The default is the weight that
    /// the [`Format`] assigns to a value without a weight: 1, or 10 or 100 in the formats of some other libraries.
    pub fn weight(mut self, weight: u32) -> Self {
        self.advertisement.weight = Some(weight);
        self
    }

    /// Sets whether the entry states that the server uses TLS, if the [`Format`] has a field for that. Clients of other libraries can use
    /// this hint when they connect; clients of this library ignore it. Disabled by default.
    pub fn tls_hint(mut self, tls: bool) -> Self {
        self.advertisement.tls = tls;
        self
    }

    /// Sets the zone. The default is no zone.
    pub fn zone(mut self, zone: impl Into<String>) -> Self {
        self.advertisement.zone = Some(zone.into());
        self
    }

    /// Sets the version. The default is no version.
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.advertisement.version = Some(version.into());
        self
    }

    /// Adds one metadata entry. The names `weight`, `zone`, `version` and `leaving` are rejected, because they are the names of attributes.
    pub fn metadata(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.advertisement
            .metadata
            .push((name.into(), value.into()));
        self
    }

    /// Sets the time to live of the lease: how long etcd keeps the entry of a server that has died. The TTL must be from 2 s to 1 day; 2 s
    /// is the minimum of etcd with its default settings. Fractions of a second are rounded up. The lease is renewed whenever a third of the
    /// TTL that etcd grants has passed; the first renewal is earlier, at a random time. The entry of a dead server can remain for longer
    /// than the TTL, because the TTL of every lease restarts when etcd elects a leader.
    ///
    /// The default is 15 s for a service with up to 250 servers, 60 ms for each server of a larger service, and 120 s for 2 000 servers and
    /// more. The servers of one service then renew about 50 leases per second. With a TTL of 15 s, 10 000 servers would renew 2 000 leases
    /// per second, which is a core of etcd (measured). The registration counts the servers when it is granted a lease. If it may not read
    /// the keys of the service, or is registered at an exact key, the default is 15 s.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// Lets operators pause, resume and weight the server from outside: the server watches the key
    /// `<control prefix><service>/instances/<instance id>`. The usual prefix is `/gRPC.control/`. Disabled by default.
    ///
    /// The value of the key is JSON: `{"state":"draining"}` or `{"state":"paused"}` removes the entry of the server, as
    /// [`Registration::pause`] does, and `{"state":"serving"}` restores it. `"weight":5` replaces the weight. The deletion of the key
    /// restores the options of the server. A server that starts later with the same instance id ignores the key, unless the value has
    /// `"sticky":true`. With a sticky pause, [`register`](Self::register) returns although the server is not registered.
    ///
    /// While the key exists, the server reports the outcome under `<control prefix><service>/status/<instance id>`, for example
    /// `{"state":"draining","weight":1,"address":"10.0.0.5:50051","applied":4711,"connections":3}`. `applied` is the mod revision of the
    /// value that the server has read. The state is `draining` until the entry is removed and the last connection is closed, and then
    /// `paused`. If the value cannot be used, the last good one remains in force, and `error` contains the reason.
    ///
    /// With authentication, operators need the permission to write below `<control prefix><service>/instances/`. The server needs the
    /// permissions to read there, and to write below `<control prefix><service>/status/`. Without them, the server runs as without this
    /// option. The option costs etcd one watch per server, on a stream that the server already has, and one read every 1 to 2 minutes.
    pub fn operator_control(mut self, control_prefix: impl Into<String>) -> Self {
        self.control_prefix = Some(control_prefix.into());
        self
    }

    /// Sets the format of the key and the value. The default is [`Format::EtcdNaming`].
    pub fn format(mut self, format: Format) -> Self {
        self.format = format;
        self
    }

    /// Sets how long [`register`](Self::register) retries while etcd is unavailable. The default is 30 s. If the timeout is exceeded,
    /// `register` first removes everything that may have reached etcd, and then returns an error. The removal takes up to
    /// [`deregister_timeout`](Self::deregister_timeout) plus one second. After the first success, a registration retries without limit.
    pub fn startup_timeout(mut self, timeout: Duration) -> Self {
        self.startup_timeout = timeout;
        self
    }

    /// Sets the timeout of [`deregister`](Registration::deregister) and of the other changes of a registration. All of them retry while
    /// etcd is unavailable. The default is 5 s. After the timeout, a deregistration is abandoned, and other changes are still attempted in
    /// the background. An entry that a deregistration could not remove is removed when its lease expires.
    pub fn deregister_timeout(mut self, timeout: Duration) -> Self {
        self.deregister_timeout = timeout;
        self
    }

    /// Returns a receiver for the state of the registration. The receiver is valid before the registration starts, so create it before you
    /// pass the builder to a server.
    #[must_use]
    pub fn watch_state(&self) -> watch::Receiver<RegistrationState> {
        self.states.subscribe()
    }

    /// Registers the server. It stays registered until [`Registration::deregister`] is called, or the [`Registration`] is dropped.
    ///
    /// Returns once the key is in etcd. An old entry under the same key, for example of a crashed server, is overwritten.
    ///
    /// # Errors
    ///
    /// An invalid option is rejected before the first request to etcd; the error names the option. An error that only an operator can
    /// resolve (permission denied, credentials) is returned at once. If etcd is unavailable, an error is returned after
    /// [`startup_timeout`](Self::startup_timeout). After an error, the registration has ended. An entry that could not be removed is
    /// removed when its lease expires.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, everything that it has written to etcd is removed in the background.
    ///
    /// # Panics
    ///
    /// Panics outside a tokio runtime.
    pub async fn register(self) -> Result<Registration, RegisterError> {
        self.check_without_server()?;
        let startup_timeout = self.startup_timeout;
        let registration = self.start(None).await?;
        if let Err(error) = registration.registered(startup_timeout).await {
            // Everything that may have reached etcd is removed before the error is returned.
            if let Err(error) = registration.deregister().await {
                tracing::debug!(%error, "could not remove the entry; it is removed when its lease expires");
            }
            return Err(error);
        }
        Ok(registration)
    }

    /// Starts the registration. `bound` is the address of the listener, if the server registers itself.
    pub(crate) async fn start(
        self,
        bound: Option<SocketAddr>,
    ) -> Result<Registration, RegisterError> {
        self.check()?;
        let entry = self.entry(self.advertised(bound).await?)?;
        let handles = self.serve.started;
        let control = match &self.control_prefix {
            Some(prefix) => {
                let keys = ControlKeys::new(prefix, &entry.services, &entry.keys);
                Some((Control::new(self.etcd.clone(), keys).await, entry.clone()))
            }
            None => None,
        };
        let states = self.states.subscribe();
        let registration = Registration::start(
            self.etcd,
            entry,
            self.deregister_timeout,
            self.dedicated_thread,
            self.states,
        )?;
        handles.send_replace(Some(registration.started()));
        if let Some((control, entry)) = control {
            if control.starts_paused() {
                registration.start_paused();
            }
            let handle = RegistrationHandle::new(handles.subscribe(), self.serve.stop);
            control.spawn(&entry, handle, states, self.serve.connections);
        }
        Ok(registration)
    }
}

const STARTUP_TIMEOUT: Duration = Duration::from_secs(30);
const DEREGISTER_TIMEOUT: Duration = Duration::from_secs(5);

fn new_states() -> watch::Sender<RegistrationState> {
    watch::Sender::new(RegistrationState::Registering { last_error: None })
}
