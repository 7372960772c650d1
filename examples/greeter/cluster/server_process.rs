//! A greeter in a process of its own.

use std::io::Read;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, ChildStdin, Command};
use tokio::time::timeout;
use tonic::transport::Server;
use tonic_etcd::{Registry, ServeRegistered};

use crate::greeter::{NamedGreeter, greeter_server::GreeterServer};
use crate::{Error, SERVICE};

/// A server in a separate process.
pub struct ServerProcess {
    child: Child,
    /// The pipe to the standard input of the process. The process exits when the pipe is closed. If
    /// `child` owned the pipe, `Child::wait` would close it, and the process would exit before its
    /// graceful shutdown is complete.
    _stdin: Option<ChildStdin>,
}

impl ServerProcess {
    /// Starts this program again as a server.
    pub fn start(name: &str, endpoints: &str) -> Result<Self, Error> {
        let mut command = Command::new(std::env::current_exe()?);
        let mut child = command
            .args(["serve", name, endpoints])
            .stdin(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let stdin = child.stdin.take();
        Ok(Self {
            child,
            _stdin: stdin,
        })
    }

    /// Sends SIGTERM, as Kubernetes and systemd do.
    pub fn terminate(&self) -> Result<(), Error> {
        if let Some(pid) = self.child.id() {
            kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGTERM)?;
        }
        Ok(())
    }

    /// Sends SIGKILL, and waits until the process has ended.
    pub async fn kill(&mut self) -> Result<(), Error> {
        Ok(self.child.kill().await?)
    }

    /// Waits until the process ends. Fails if it ends with an error.
    pub async fn ended(&mut self) -> Result<(), Error> {
        let status = timeout(Duration::from_secs(10), self.child.wait()).await??;
        if status.success() {
            Ok(())
        } else {
            Err(format!("a server ended with {status}").into())
        }
    }
}

/// Serves as the server `name` until SIGTERM.
pub async fn serve(name: &str, endpoints: &str) -> Result<(), Error> {
    // The parent has the other end of the pipe to standard input. When the parent ends, the read
    // returns and this process exits. The read runs on a thread outside the runtime. With tokio's
    // stdin, the shutdown of the runtime would wait for the read.
    std::thread::spawn(|| {
        let _ = std::io::stdin().read(&mut [0]);
        std::process::exit(1);
    });
    let registry = Registry::builder(endpoints.split(','))
        .prefix("/greeter-cluster/")
        .connect()
        .await?;
    let registration = registry.registration(SERVICE).ttl(Duration::from_secs(5));
    let greeter = GreeterServer::new(NamedGreeter(name.to_owned()));
    Server::builder()
        .add_service(greeter)
        .serve_registered("127.0.0.1:0".parse()?, registration)
        .await?;
    Ok(())
}
