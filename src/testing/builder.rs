//! The configuration and the start of an [`Etcd`].

use std::{
    ffi::OsString,
    io, iter,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    binary,
    error::ProcessError,
    etcd::Etcd,
    member::{self, Member, Ports},
    peers::Peers,
};

/// Maximum number of start attempts. The start is repeated only if another process has taken one of
/// the ports after it was found free.
const START_ATTEMPTS: usize = 5;

/// Builder of an [`Etcd`], returned by [`Etcd::builder`].
#[derive(Debug, Clone)]
pub struct EtcdBuilder {
    members: usize,
    args: Vec<OsString>,
    binary: Option<PathBuf>,
    start_timeout: Duration,
    tls: bool,
    partitionable: bool,
}

impl Etcd {
    /// Returns a builder, which has more options than [`Etcd::start`].
    #[must_use]
    pub fn builder() -> EtcdBuilder {
        EtcdBuilder::new()
    }
}

impl EtcdBuilder {
    /// Creates a builder for one member, with the installed etcd and its default settings.
    pub(super) fn new() -> Self {
        Self {
            members: 1,
            args: Vec::new(),
            binary: None,
            start_timeout: Duration::from_secs(30),
            tls: false,
            partitionable: false,
        }
    }

    /// Sets the number of members; 0 counts as 1. The default is 1.
    #[must_use]
    pub fn members(mut self, members: usize) -> Self {
        self.members = members.max(1);
        self
    }

    /// Adds a flag for every member, such as `--auth-token=simple`. Can be called repeatedly.
    ///
    /// etcd's default election timeout is one second. A single member waits for a random part of it
    /// before it serves. Tests that start many members can add `--heartbeat-interval=10` and
    /// `--election-timeout=100`. etcd then also reacts faster to the loss of a member.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Makes each member also listen for TLS clients, at [`Etcd::tls_endpoints`], with this
    /// certificate and its key. etcd reads the files again at each handshake.
    ///
    /// With `--client-cert-auth=true` and `--trusted-ca-file` as further [arguments](Self::arg),
    /// etcd requires a client certificate.
    #[must_use]
    pub fn tls(self, certificate: impl AsRef<Path>, key: impl AsRef<Path>) -> Self {
        let flag = |name: &str, path: &Path| {
            let mut flag = OsString::from(name);
            flag.push(path);
            flag
        };
        let certificate = flag("--cert-file=", certificate.as_ref());
        let mut this = self.arg(certificate).arg(flag("--key-file=", key.as_ref()));
        this.tls = true;
        this
    }

    /// Enables [`Etcd::isolate`]. For this, the traffic between members passes through proxies.
    #[must_use]
    pub fn partitionable(mut self) -> Self {
        self.partitionable = true;
        self
    }

    /// Sets the path of the etcd binary. The default is the path in `ETCD_BIN`, or else the `etcd`
    /// on `PATH`.
    #[must_use]
    pub fn binary(mut self, binary: impl Into<PathBuf>) -> Self {
        self.binary = Some(binary.into());
        self
    }

    /// Sets the timeout within which the members must become healthy, at the start and at each
    /// restart. The default is 30 s.
    #[must_use]
    pub fn start_timeout(mut self, timeout: Duration) -> Self {
        self.start_timeout = timeout;
        self
    }

    /// Starts the members and waits until all of them are healthy.
    ///
    /// # Errors
    ///
    /// Fails if no etcd binary is found, or if a member cannot be started, exits early, or is not
    /// healthy in time. In that case, no process and no file is left behind.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped before it completes, no process and no file is left behind.
    pub async fn start(self) -> Result<Etcd, ProcessError> {
        let binary = self.binary.clone().map_or_else(binary::find, Ok)?;
        let version = binary::version(&binary).await?;
        let mut attempts = 1;
        loop {
            let mut etcd = self.prepare(&binary, &version)?;
            match etcd.start_all().await {
                Err(error) if attempts < START_ATTEMPTS && is_port_taken(&error) => attempts += 1,
                started => return started.map(|()| etcd),
            }
        }
    }

    /// Reserves the ports and the directory of an etcd. No member is started yet.
    fn prepare(&self, binary: &Path, version: &str) -> Result<Etcd, ProcessError> {
        let directory = tempfile::Builder::new().prefix("tonic-etcd-").tempdir();
        let directory = directory.map_err(ProcessError::Prepare)?;
        let ports = iter::repeat_with(Ports::draw).take(self.members);
        let ports: Vec<_> = ports
            .collect::<io::Result<_>>()
            .map_err(ProcessError::Prepare)?;
        let mut reached: Vec<_> = ports.iter().map(|ports| ports.peer.number()).collect();
        let peers = self.partitionable.then(|| Peers::start(&reached));
        let peers = peers.transpose().map_err(ProcessError::Prepare)?;
        if let Some(peers) = &peers {
            reached = peers.ports();
        }
        // The token is random. etcd derives the cluster id from it, among other values, so two
        // clusters never share an id.
        let token = format!("tonic-etcd-{:016x}", fastrand::u64(..));
        let flags: Vec<_> = (0..self.members)
            .map(|index| member::flags(index, &ports, &reached, self.tls, &token))
            .map(|flags| [flags, self.args.clone()].concat())
            .collect();
        let members = iter::zip(ports, flags).enumerate();
        let members = members.map(|(index, (ports, flags))| Member {
            index,
            binary: binary.to_owned(),
            directory: directory.path().to_owned(),
            ports,
            flags,
            process: None,
        });
        Ok(Etcd {
            members: members.collect(),
            version: version.to_owned(),
            start_timeout: self.start_timeout,
            peers,
            _directory: directory,
        })
    }
}

/// Returns whether a member failed to start because one of its ports was already in use.
fn is_port_taken(error: &ProcessError) -> bool {
    matches!(error, ProcessError::ExitedEarly { log, .. } if log.contains("address already in use"))
}
