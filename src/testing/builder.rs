//! How an [`Etcd`] is set up and started.

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

/// How often a start is tried when another process is faster to take a port that was free.
const START_ATTEMPTS: usize = 5;

/// Sets up an [`Etcd`]; made by [`Etcd::builder`].
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
    /// Sets up an etcd with more options.
    #[must_use]
    pub fn builder() -> EtcdBuilder {
        EtcdBuilder::new()
    }
}

impl EtcdBuilder {
    /// One member of whichever etcd is installed, with its default settings.
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

    /// Adds a flag for every member, such as `--auth-token=simple`. May be called repeatedly.
    ///
    /// etcd's default election timeout of a second is kept, and a single member waits for a random
    /// part of it before it serves. Tests that start many can add `--heartbeat-interval=10` and
    /// `--election-timeout=100`; what etcd does when it loses a member then happens faster, too.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Listens for clients that speak TLS as well, with this certificate and its key, at
    /// [`Etcd::tls_endpoints`]. etcd reads the files again at each handshake.
    ///
    /// With `--client-cert-auth=true` and `--trusted-ca-file` as further [arguments](Self::arg) it asks
    /// clients for a certificate.
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

    /// Makes [`Etcd::isolate`] possible: what the members say to each other goes through proxies.
    #[must_use]
    pub fn partitionable(mut self) -> Self {
        self.partitionable = true;
        self
    }

    /// Sets the etcd binary. The default is what `ETCD_BIN` names, or else the `etcd` on `PATH`.
    #[must_use]
    pub fn binary(mut self, binary: impl Into<PathBuf>) -> Self {
        self.binary = Some(binary.into());
        self
    }

    /// Sets how long the members may take to become healthy, at the start and at each restart. The
    /// default is 30 s.
    #[must_use]
    pub fn start_timeout(mut self, timeout: Duration) -> Self {
        self.start_timeout = timeout;
        self
    }

    /// Starts the members and waits until all of them are healthy.
    ///
    /// # Errors
    ///
    /// Fails if there is no etcd binary, or if a member cannot be started, exits early, or is not
    /// healthy in time. Nothing is left behind then.
    ///
    /// # Cancel safety
    ///
    /// A start that is dropped midway leaves nothing behind.
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

    /// An etcd that has its ports and its directory, with no member started yet.
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
        // The token is part of what the cluster id is made of: two clusters never share one.
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

/// Whether a member lost the race for one of its ports.
fn is_port_taken(error: &ProcessError) -> bool {
    matches!(error, ProcessError::ExitedEarly { log, .. } if log.contains("address already in use"))
}
