//! Serves the metrics of an example over HTTP, for Prometheus.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "several examples share the file, and each uses only a part of it"
)]

use std::net::SocketAddr;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

#[path = "prometheus.rs"]
mod prometheus;
pub use prometheus::Prometheus;

/// Returns the address of the option `--metrics ADDRESS`, which is the only one of the examples.
pub fn address_in(arguments: &[String]) -> Result<Option<SocketAddr>, String> {
    match arguments {
        [] => Ok(None),
        [option, address] if option == "--metrics" => match address.parse() {
            Ok(address) => Ok(Some(address)),
            Err(error) => Err(format!("--metrics {address}: {error}")),
        },
        _ => Err("the only option is --metrics ADDRESS".to_owned()),
    }
}

/// Serves the metrics of the returned recorder at `address`. Returns the bound address as well.
pub async fn start(
    address: SocketAddr,
    on_error: impl Fn(String) + Clone + Send + 'static,
) -> std::io::Result<(Prometheus, SocketAddr)> {
    let recorder = Prometheus::default();
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?;
    tokio::spawn(serve(listener, recorder.clone(), on_error));
    Ok((recorder, address))
}

async fn serve(
    listener: TcpListener,
    recorder: Prometheus,
    on_error: impl Fn(String) + Clone + Send + 'static,
) {
    while let Ok((stream, _)) = listener.accept().await {
        let recorder = recorder.clone();
        let answer = service_fn(move |_| {
            let text = recorder.text();
            async move {
                let text = text.map_err(std::io::Error::other)?;
                let answer = http::Response::builder().header("content-type", CONTENT_TYPE);
                answer.body(text).map_err(std::io::Error::other)
            }
        });
        let serving = http1::Builder::new().serve_connection(TokioIo::new(stream), answer);
        let on_error = on_error.clone();
        tokio::spawn(async move {
            if let Err(error) = serving.await {
                on_error(format!("a scrape failed: {error}"));
            }
        });
    }
}

const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
