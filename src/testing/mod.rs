//! A real etcd for tests and examples: on free loopback ports, in a temporary directory, gone when
//! it is dropped.
//!
//! [`Etcd`] runs the `etcd` binary, one member or a cluster of any size, and can do to each member
//! what happens to it in production: stop it, kill it, freeze it, start it again, lose its data.
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
//! // The whole cluster loses its data and comes back empty, at the same addresses.
//! etcd.kill_all().await?;
//! etcd.wipe_all().await?;
//! etcd.restart_all().await?;
//! # Ok(())
//! # }
//! ```
//!
//! # The binary
//!
//! It is the one given to [`EtcdBuilder::binary`], or named by the environment variable `ETCD_BIN`,
//! or else the `etcd` on `PATH`. Debian and Ubuntu have it in the package `etcd-server`, Fedora and
//! Arch Linux in `etcd`, and on macOS `brew install etcd` installs it. etcd 3.4 and later will do.
//! `ETCD_*` variables, which etcd would take for its flags, are kept from it.
//!
//! # What is left behind
//!
//! Nothing. Dropping an [`Etcd`] kills its members and removes its directory. Where no drop happens
//! (`SIGKILL`, an abort, `std::process::exit`, a `static`), a small `sh` beside each member does it
//! as soon as the owner is gone. Members do not belong to the terminal's process group, so Ctrl-C
//! reaches only the owner.
//!
//! # Limits
//!
//! Unix only. Everything here happens in real time: do not use it on a runtime whose clock is
//! paused. Member traffic is plaintext.

mod binary;
mod builder;
mod error;
mod etcd;
mod health;
mod member;
mod peers;
mod port;
mod probe;
mod process;

pub use self::builder::EtcdBuilder;
pub use self::error::ProcessError;
pub use self::etcd::Etcd;
