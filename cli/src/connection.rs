//! Connections to etcd.

use etcd_client::{Client, ConnectOptions};
use tonic::body::Body;
use tonic_etcd::channel::ResponseBody;
use tonic_etcd::registry::RegistryBuilder;
use tonic_etcd::{BalancedChannel, Registry, TlsConfig};
use tower::util::{BoxCloneSyncService, ServiceExt};

use crate::error::Failure;
use crate::options::Options;

/// Connects to etcd through the library, which reports a wrong address, user or TLS configuration with advice.
pub(crate) async fn registry(options: &Options) -> Result<Registry, Failure> {
    let builder = registry_builder(options)?;
    // The library bounds each of its requests. The members are tried one after the other, hence the factor.
    let limit = options.timeout * u32::try_from(options.endpoints.len().max(1)).unwrap_or(u32::MAX);
    match tokio::time::timeout(limit, builder.connect()).await {
        Ok(connected) => Ok(connected?),
        Err(_) => Err(Failure::new(
            crate::error::code::ETCD,
            format!(
                "etcd did not respond at {} within {limit:?}; check --endpoints, or raise --timeout",
                options.endpoints.join(", ")
            ),
        )),
    }
}

/// Returns a builder with all options.
pub(crate) fn registry_builder(options: &Options) -> Result<RegistryBuilder, Failure> {
    let mut builder = Registry::builder(options.endpoints.iter().map(String::as_str));
    if let Some(prefix) = &options.prefix {
        builder = builder.prefix(prefix);
    }
    if let Some((user, password)) = options.credentials()? {
        builder = builder.user(user, password);
    }
    if let Some(tls) = tls_config(options) {
        builder = builder.tls_config(tls);
    }
    Ok(builder)
}

/// Connects to etcd for the requests that the library does not offer: leases, members, alarms and plain keys. First connects through the
/// library, whose errors are better.
pub(crate) async fn client(options: &Options) -> Result<Client, Failure> {
    drop(registry(options).await?);
    let endpoints = options.endpoints.iter().map(|endpoint| host_port(endpoint));
    open(options, endpoints).await
}

/// Connects to one member.
pub(crate) async fn member(options: &Options, endpoint: &str) -> Result<Client, Failure> {
    open(options, [host_port(endpoint)]).await
}

async fn open(
    options: &Options,
    endpoints: impl IntoIterator<Item = String>,
) -> Result<Client, Failure> {
    let mut builder = BalancedChannel::builder()
        .addresses(endpoints)
        .timeout(options.timeout)
        .startup_timeout(options.timeout)
        .connect_timeout(options.timeout);
    if let Some(tls) = tls_config(options) {
        builder = builder.tls_config(tls);
    }
    let service = builder
        .connect_lazy()
        .map_response(|response: http::Response<ResponseBody>| response.map(Body::new))
        .map_err(tower::BoxError::from);
    let channel = etcd_client::Channel::Custom(BoxCloneSyncService::new(service));
    let mut connect = ConnectOptions::new().with_auto_token_refresh(true);
    if let Some((user, password)) = options.credentials()? {
        connect = connect.with_user(user, password);
    }
    Client::from_channel(channel, Some(connect))
        .await
        .map_err(|error| Failure::of_etcd("log in to etcd", &error))
}

fn tls_config(options: &Options) -> Option<TlsConfig> {
    let is_https = |endpoint: &String| endpoint.trim().starts_with("https://");
    let wanted = options.cacert.is_some()
        || options.cert.is_some()
        || options.endpoints.iter().any(is_https);
    if !wanted {
        return None;
    }
    let mut tls = TlsConfig::verify_dialled_host();
    tls = match &options.cacert {
        Some(path) => tls.ca_certificate_file(path),
        None => tls.with_native_roots(),
    };
    if let (Some(cert), Some(key)) = (&options.cert, &options.key) {
        tls = tls.identity_files(cert, key);
    }
    Some(tls)
}

/// Returns an endpoint or a client URL without the scheme and the slash at the end.
pub(crate) fn host_port(endpoint: &str) -> String {
    let endpoint = endpoint.trim();
    let rest = endpoint
        .split_once("://")
        .map_or(endpoint, |(_, rest)| rest);
    rest.trim_end_matches('/').to_owned()
}

/// Returns whether the connections to etcd use TLS.
pub(crate) fn is_tls(options: &Options) -> bool {
    tls_config(options).is_some()
}
