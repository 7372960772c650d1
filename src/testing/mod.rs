//! A real etcd for tests and examples. It runs on free loopback ports in a temporary directory.
//! Dropping it removes its processes and its directory.
//!
//! [`Etcd`] runs the `etcd` binary as one member or as a cluster of any size. For each member, it
//! can reproduce the faults of production: stop, kill, freeze, restart, and loss of data.
//!
//! ```no_run
//! use tonic_etcd::testing::Etcd;
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let mut etcd = Etcd::start_cluster(3).await?;
//! println!("etcd {} at {:?}", etcd.version(), etcd.endpoints());
//!
//! // The leader hangs: it still accepts connections, but answers nothing.
//! let leader = etcd.leader().await.ok_or("no leader")?;
//! etcd.freeze(leader).await?;
//! etcd.thaw(leader).await?;
//!
//! // The whole cluster loses its data and restarts empty, at the same addresses.
//! etcd.kill_all().await?;
//! etcd.wipe_all().await?;
//! etcd.restart_all().await?;
//! # Ok(())
//! # }
//! ```
//!
//! # The binary
//!
//! The binary is the path passed to [`EtcdBuilder::binary`], else the path in the environment
//! variable `ETCD_BIN`, else the `etcd` on `PATH`. The package is `etcd-server` on Debian and
//! Ubuntu, and `etcd` on Fedora and Arch Linux. On macOS, `brew install etcd` installs it. etcd 3.4
//! and later are supported. `ETCD_*` environment variables are not passed to etcd, because etcd
//! would read them as flags.
//!
//! # Cleanup
//!
//! Dropping an [`Etcd`] kills its members and removes its directory. But the value is not dropped
//! if the owner (the process that has started etcd) ends by a `SIGKILL`, an abort or
//! `std::process::exit`, or if the value is in a `static`. In these cases, a small `sh` process
//! beside each member kills the member and removes the directory as soon as the owner has exited.
//! Nothing is left behind in either case. Members do not belong to the process group of the
//! terminal, so Ctrl-C reaches only the owner.
//!
//! # Limits
//!
//! This module is Unix only. It uses real time, so do not use it on a tokio runtime with a paused
//! clock. Traffic between members is plaintext.

mod binary;
mod builder;
mod error;
mod etcd;
mod member;
mod peers;
mod port;
mod probe;
mod process;
mod startup;

pub use self::builder::EtcdBuilder;
pub use self::error::ProcessError;
pub use self::etcd::Etcd;
