//! The channels that the service describes, and the ids of their endpoints and connections.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tonic_balance::BalancedChannel;
use tonic_balance::channel::EndpointStatus;

use crate::proto::channelz_server::ChannelzServer;

/// The channels of a process, as the service channelz describes them.
///
/// A clone shares the channels. A channel that was added stays open until [`remove`](Self::remove) is called.
#[derive(Clone, Debug, Default)]
pub struct Channelz {
    channels: Arc<Mutex<Channels>>,
}

impl Channelz {
    /// Creates a service without channels.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a channel. `target` is the name that tools display, for example `etcd:///greeter`. Returns the id of the channel.
    #[allow(
        clippy::must_use_candidate,
        reason = "most programs never remove a channel"
    )]
    pub fn add(&self, target: impl Into<String>, channel: BalancedChannel) -> i64 {
        let mut channels = self.lock();
        let id = channels.new_id();
        let target = target.into();
        channels.listed.insert(
            id,
            Listed {
                target,
                channel,
                endpoints: BTreeMap::new(),
            },
        );
        id
    }

    /// Removes a channel. Returns whether the service has listed it.
    #[allow(
        clippy::must_use_candidate,
        reason = "whether it was listed is of no interest to most programs"
    )]
    pub fn remove(&self, id: i64) -> bool {
        self.lock().listed.remove(&id).is_some()
    }

    /// Returns the service, to be added to a server.
    #[must_use]
    pub fn service(&self) -> ChannelzServer<Self> {
        ChannelzServer::new(self.clone())
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Channels> {
        // No code panics while it holds the lock.
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The listed channels. Channels, subchannels and sockets share one sequence of ids, as gRFC A14 demands.
#[derive(Debug, Default)]
pub(crate) struct Channels {
    last_id: i64,
    pub(crate) listed: BTreeMap<i64, Listed>,
}

/// A channel, with the ids that its endpoints have received so far.
#[derive(Debug)]
pub(crate) struct Listed {
    pub(crate) target: String,
    channel: BalancedChannel,
    endpoints: BTreeMap<String, Ids>,
}

/// The ids of an endpoint and of its connections. A connection has no identity outside the channel, so the n-th connection of an endpoint
/// keeps the n-th id.
#[derive(Clone, Debug)]
pub(crate) struct Ids {
    pub(crate) subchannel: i64,
    pub(crate) sockets: Vec<i64>,
}

impl Channels {
    fn new_id(&mut self) -> i64 {
        self.last_id += 1;
        self.last_id
    }

    /// Returns the target of a channel and its endpoints. New endpoints and connections get their ids.
    pub(crate) fn describe(&mut self, id: i64) -> Option<(String, Vec<(Ids, EndpointStatus)>)> {
        let Self { last_id, listed } = self;
        let Listed {
            target,
            channel,
            endpoints,
        } = listed.get_mut(&id)?;
        let statuses = channel.endpoints();
        let mut next = || {
            *last_id += 1;
            *last_id
        };
        let known = std::mem::take(endpoints);
        let mut described = Vec::with_capacity(statuses.len());
        for status in statuses {
            let address = status.address.to_string();
            let mut ids = known.get(&address).cloned().unwrap_or_else(|| Ids {
                subchannel: next(),
                sockets: Vec::new(),
            });
            ids.sockets.truncate(status.connections);
            ids.sockets.resize_with(status.connections, &mut next);
            endpoints.insert(address, ids.clone());
            described.push((ids, status));
        }
        described.sort_by_key(|(ids, _)| ids.subchannel);
        Some((target.clone(), described))
    }

    /// Returns the first endpoint of any channel that `is_sought` accepts.
    pub(crate) fn find(
        &mut self,
        is_sought: impl Fn(&Ids) -> bool,
    ) -> Option<(Ids, EndpointStatus)> {
        let channels: Vec<_> = self.listed.keys().copied().collect();
        let mut endpoints = channels.into_iter().filter_map(|id| self.describe(id));
        endpoints.find_map(|(_, endpoints)| {
            let mut endpoints = endpoints.into_iter();
            endpoints.find(|(ids, _)| is_sought(ids))
        })
    }
}
