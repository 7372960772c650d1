//! The methods of the service.

use std::net::IpAddr;

use tonic::{Request, Response, Status};
use tonic_balance::channel::{EndpointState, EndpointStatus};

use crate::channels::{Channels, Channelz, Ids};
use crate::proto::address::{OtherAddress, TcpIpAddress, UdsAddress};
use crate::proto::channel_connectivity_state::State;
use crate::proto::channel_trace_event::Severity;
use crate::proto::channelz_server;
use crate::proto::{
    Address, Channel, ChannelConnectivityState, ChannelData, ChannelRef, ChannelTrace,
    ChannelTraceEvent, GetChannelRequest, GetChannelResponse, GetServerRequest, GetServerResponse,
    GetServerSocketsRequest, GetServerSocketsResponse, GetServersRequest, GetServersResponse,
    GetSocketRequest, GetSocketResponse, GetSubchannelRequest, GetSubchannelResponse,
    GetTopChannelsRequest, GetTopChannelsResponse, Socket, SocketData, SocketRef, Subchannel,
    SubchannelRef, address,
};

#[tonic::async_trait]
impl channelz_server::Channelz for Channelz {
    async fn get_top_channels(
        &self,
        request: Request<GetTopChannelsRequest>,
    ) -> Result<Response<GetTopChannelsResponse>, Status> {
        let request = request.into_inner();
        let limit = match usize::try_from(request.max_results) {
            Ok(1..) => usize::try_from(request.max_results)
                .unwrap_or(PAGE)
                .min(PAGE),
            _ => PAGE,
        };
        let mut channels = self.lock();
        let ids = channels.listed.range(request.start_channel_id..);
        let mut ids: Vec<_> = ids.map(|(id, _)| *id).take(limit + 1).collect();
        let end = ids.len() <= limit;
        ids.truncate(limit);
        let channel = ids.iter().filter_map(|id| channel(&mut channels, *id));
        let channel = channel.collect();
        Ok(Response::new(GetTopChannelsResponse { channel, end }))
    }

    async fn get_channel(
        &self,
        request: Request<GetChannelRequest>,
    ) -> Result<Response<GetChannelResponse>, Status> {
        let id = request.into_inner().channel_id;
        let channel = channel(&mut self.lock(), id);
        let channel = Some(channel.ok_or_else(|| not_found("channel", id))?);
        Ok(Response::new(GetChannelResponse { channel }))
    }

    async fn get_subchannel(
        &self,
        request: Request<GetSubchannelRequest>,
    ) -> Result<Response<GetSubchannelResponse>, Status> {
        let id = request.into_inner().subchannel_id;
        let found = self.lock().find(|ids| ids.subchannel == id);
        let (ids, status) = found.ok_or_else(|| not_found("subchannel", id))?;
        let subchannel = Some(subchannel(&ids, &status));
        Ok(Response::new(GetSubchannelResponse { subchannel }))
    }

    async fn get_socket(
        &self,
        request: Request<GetSocketRequest>,
    ) -> Result<Response<GetSocketResponse>, Status> {
        let id = request.into_inner().socket_id;
        let found = self.lock().find(|ids| ids.sockets.contains(&id));
        let (_, status) = found.ok_or_else(|| not_found("socket", id))?;
        let socket = Some(Socket {
            r#ref: Some(socket_ref(id, &status)),
            data: Some(SocketData {}),
            remote: Some(remote(&status.address)),
            remote_name: status.address.to_string(),
        });
        Ok(Response::new(GetSocketResponse { socket }))
    }

    async fn get_servers(
        &self,
        _: Request<GetServersRequest>,
    ) -> Result<Response<GetServersResponse>, Status> {
        let (server, end) = (Vec::new(), true);
        Ok(Response::new(GetServersResponse { server, end }))
    }

    async fn get_server(
        &self,
        request: Request<GetServerRequest>,
    ) -> Result<Response<GetServerResponse>, Status> {
        Err(not_found("server", request.into_inner().server_id))
    }

    async fn get_server_sockets(
        &self,
        request: Request<GetServerSocketsRequest>,
    ) -> Result<Response<GetServerSocketsResponse>, Status> {
        Err(not_found("server", request.into_inner().server_id))
    }
}

fn not_found(what: &str, id: i64) -> Status {
    Status::not_found(format!("no {what} has the id {id}"))
}

fn channel(channels: &mut Channels, id: i64) -> Option<Channel> {
    let (target, endpoints) = channels.describe(id)?;
    let states = endpoints.iter().map(|(_, status)| status.state);
    let sum = |count: fn(&EndpointStatus) -> u64| {
        let counts = endpoints.iter().map(|(_, status)| count(status));
        counts.sum()
    };
    let data = data(
        &target,
        aggregate(states),
        sum(|status| status.calls),
        sum(succeeded),
        sum(|status| status.failures),
    );
    let subchannels = endpoints
        .iter()
        .map(|(ids, status)| subchannel_ref(ids, status));
    Some(Channel {
        r#ref: Some(ChannelRef {
            channel_id: id,
            name: target,
        }),
        data: Some(data),
        subchannel_ref: subchannels.collect(),
    })
}

fn subchannel(ids: &Ids, status: &EndpointStatus) -> Subchannel {
    let mut data = data(
        status.address.as_str(),
        state(status.state),
        status.calls,
        succeeded(status),
        status.failures,
    );
    data.trace = status.last_error.as_ref().map(|error| ChannelTrace {
        num_events_logged: 1,
        events: vec![ChannelTraceEvent {
            description: error.clone(),
            severity: Severity::CtWarning.into(),
        }],
    });
    let sockets = ids.sockets.iter().map(|id| socket_ref(*id, status));
    Subchannel {
        r#ref: Some(subchannel_ref(ids, status)),
        data: Some(data),
        socket_ref: sockets.collect(),
    }
}

fn subchannel_ref(ids: &Ids, status: &EndpointStatus) -> SubchannelRef {
    SubchannelRef {
        subchannel_id: ids.subchannel,
        name: status.address.to_string(),
    }
}

fn socket_ref(id: i64, status: &EndpointStatus) -> SocketRef {
    SocketRef {
        socket_id: id,
        name: status.address.to_string(),
    }
}

fn data(target: &str, state: State, started: u64, succeeded: u64, failed: u64) -> ChannelData {
    let count = |number| i64::try_from(number).unwrap_or(i64::MAX);
    ChannelData {
        state: Some(ChannelConnectivityState {
            state: state.into(),
        }),
        target: target.to_owned(),
        trace: None,
        calls_started: count(started),
        calls_succeeded: count(succeeded),
        calls_failed: count(failed),
    }
}

/// Returns the number of calls that have ended and did not fail because of the endpoint.
fn succeeded(status: &EndpointStatus) -> u64 {
    let open = status.failures + status.in_flight as u64;
    status.calls.saturating_sub(open)
}

/// The channel is ready if one endpoint is ready. Otherwise it is connecting if one is connecting, and so on, as gRPC aggregates the states
/// of subchannels. A channel without endpoints is in `TRANSIENT_FAILURE`, because its calls fail.
fn aggregate(states: impl Iterator<Item = EndpointState>) -> State {
    let rank = |state: &State| match state {
        State::Ready => 0,
        State::Connecting => 1,
        State::Idle => 2,
        _ => 3,
    };
    let states = states.map(state);
    states.min_by_key(rank).unwrap_or(State::TransientFailure)
}

fn state(state: EndpointState) -> State {
    match state {
        EndpointState::Idle => State::Idle,
        EndpointState::Connecting => State::Connecting,
        EndpointState::Ready => State::Ready,
        EndpointState::TransientFailure => State::TransientFailure,
        EndpointState::Draining => State::Shutdown,
        _ => State::Unknown,
    }
}

fn remote(address: &tonic_balance::Address) -> Address {
    let text = address.as_str();
    let ip = address.host().map(|host| host.trim_matches(['[', ']']));
    let ip = ip.and_then(|ip| ip.parse::<IpAddr>().ok());
    let tcp = address.port().zip(ip);
    let address = match tcp {
        Some((port, ip)) => address::Address::TcpipAddress(TcpIpAddress {
            ip_address: match ip {
                IpAddr::V4(ip) => ip.octets().to_vec(),
                IpAddr::V6(ip) => ip.octets().to_vec(),
            },
            port: port.into(),
        }),
        None => match text.strip_prefix("unix:") {
            Some(path) => address::Address::UdsAddress(UdsAddress {
                filename: path.to_owned(),
            }),
            None => address::Address::OtherAddress(OtherAddress {
                name: text.to_owned(),
            }),
        },
    };
    Address {
        address: Some(address),
    }
}

/// Maximum number of channels in a response.
const PAGE: usize = 100;
