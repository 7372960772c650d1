//! One member of etcd and our connections to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};

use arc_swap::ArcSwap;
use etcd_client::{Client, ConnectOptions};
use http::HeaderValue;
use tonic::body::Body;
use tonic::transport;
use tower::Service;
use tower::util::{BoxCloneSyncService, MapErr, Oneshot, ServiceExt};

use super::auth::Auth;
use super::{error, rpc};
use crate::error::{EtcdError, EtcdErrorKind};

/// One member. What keeps leases alive has a connection of its own: whatever happens on the other one, watches that nobody reads or a
/// list of ten thousand keys, a renewal does not wait behind it.
pub(super) struct Member {
    pub(super) endpoint: Arc<str>,
    keys: Link,
    leases: Link,
}

/// Which connection a request goes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Traffic {
    /// Keys and watches.
    Keys,
    Leases,
}

/// A connection and the client on it.
#[derive(Clone)]
pub(super) struct Link {
    pub(super) endpoint: Arc<str>,
    pub(super) client: Client,
    /// The connection under the client; `None` for a client that the user made.
    pub(super) service: Option<LinkService>,
}

/// Opens a connection, lazily.
pub(super) type Open = Arc<dyn Fn() -> transport::Channel + Send + Sync>;

impl Member {
    /// Makes the clients without a round trip.
    pub(super) async fn lazy(endpoint: String, open: Open, auth: &Auth) -> Result<Self, EtcdError> {
        let endpoint: Arc<str> = endpoint.into();
        Ok(Self {
            keys: Link::open(&endpoint, Arc::clone(&open), auth).await?,
            leases: Link::open(&endpoint, open, auth).await?,
            endpoint,
        })
    }

    /// Takes a client that the user made, whose connections are its own.
    pub(super) fn given(client: Client) -> Self {
        let link = Link {
            endpoint: "(the given client)".into(),
            client,
            service: None,
        };
        Self {
            endpoint: Arc::clone(&link.endpoint),
            keys: link.clone(),
            leases: link,
        }
    }

    /// The same member over connections of the runtime that this is called on; a client that the user made stays on its own.
    pub(super) async fn apart(&self, auth: &Auth) -> Result<Self, EtcdError> {
        match &self.keys.service {
            Some(service) => {
                Self::lazy(self.endpoint.to_string(), Arc::clone(&service.open), auth).await
            }
            None => Ok(Self::given(self.keys.client.clone())),
        }
    }

    pub(super) fn is_given(&self) -> bool {
        self.keys.service.is_none()
    }

    pub(super) fn link(&self, traffic: Traffic) -> &Link {
        match traffic {
            Traffic::Keys => &self.keys,
            Traffic::Leases => &self.leases,
        }
    }
}

impl Link {
    async fn open(endpoint: &Arc<str>, open: Open, auth: &Auth) -> Result<Self, EtcdError> {
        let service = LinkService {
            channel: Arc::new(ArcSwap::from_pointee(open())),
            open,
            silent: Arc::default(),
            auth: auth.clone(),
        };
        let custom = BoxCloneSyncService::new(MapErr::new(
            service.clone(),
            tower::BoxError::from as fn(transport::Error) -> tower::BoxError,
        ));
        let custom = etcd_client::Channel::Custom(custom);
        let client = Client::from_channel(custom, Some(ConnectOptions::new())).await;
        Ok(Self {
            endpoint: Arc::clone(endpoint),
            client: client.map_err(|source| error::of_client("connect", endpoint, source))?,
            service: Some(service),
        })
    }

    /// Takes note of how a request on it has ended.
    pub(super) fn on_outcome(&self, failure: Option<&EtcdError>) {
        let Some(service) = &self.service else {
            return;
        };
        if failure.is_none_or(|error| error.kind() != EtcdErrorKind::DeadlineExceeded) {
            service.silent.store(0, Ordering::Relaxed);
        } else if service.silent.fetch_add(1, Ordering::Relaxed) + 1 >= SILENT {
            self.replace();
        }
    }

    /// Leaves the connection to the streams that are open on it, for a new one. What answers behind a balancer's or a service's address
    /// may be another member then; and one that is really the same has lost nothing but a handshake.
    pub(super) fn replace(&self) {
        if let Some(service) = &self.service {
            service.silent.store(0, Ordering::Relaxed);
            service.channel.store(Arc::new((service.open)()));
            tracing::debug!(endpoint = %self.endpoint, "etcd is silent on a connection; the next request opens another");
        }
    }
}

/// A connection to one member that adds the token, and asks to be refused by a member that has lost its cluster.
#[derive(Clone)]
pub(super) struct LinkService {
    channel: Arc<ArcSwap<transport::Channel>>,
    open: Open,
    /// Requests in a row that were not answered in time.
    silent: Arc<AtomicU32>,
    auth: Auth,
}

impl Service<http::Request<Body>> for LinkService {
    type Response = http::Response<Body>;
    type Error = transport::Error;
    type Future = Oneshot<transport::Channel, http::Request<Body>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        // Waited for by each request: the connection may be another one by then.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let headers = request.headers_mut();
        headers.insert("hasleader", HeaderValue::from_static("true"));
        // A token sent along with the request for a new one would have that refused as well.
        if let Some(token) = self.auth.token()
            && request.uri().path() != rpc::AUTHENTICATE
        {
            request
                .headers_mut()
                .insert("token", HeaderValue::clone(&token));
        }
        transport::Channel::clone(&self.channel.load()).oneshot(request)
    }
}

/// Requests in a row without an answer after which a connection is given up. One alone may be a disk that has stalled.
const SILENT: u32 = 2;
