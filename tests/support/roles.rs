//! The two minimal roles in etcd: a server may read and write the prefix of its service, and a client may only read this prefix.

use etcd_client::{Client, ConnectOptions, Permission, PermissionType};
use tonic_etcd::testing::Etcd;
use tonic_etcd::{Registry, error::RegistryError};

use super::client;

/// Enables authentication, with the users root, `writer` (a server with its own prefix), `reader` (a client) and `nobody` (without
/// permissions).
pub async fn protect(etcd: &Etcd) {
    let mut root = client(etcd).await;
    root.role_add("root").await.unwrap();
    for (user, role) in [
        ("root", "root"),
        ("writer", "writer"),
        ("reader", "reader"),
        ("nobody", "nobody"),
    ] {
        root.user_add(user, format!("{user}-password"), None)
            .await
            .unwrap();
        if role != "root" {
            root.role_add(role).await.unwrap();
        }
        root.user_grant_role(user, role).await.unwrap();
    }
    let own = |kind| Permission::new(kind, "/gRPC/greeter/").with_prefix();
    root.role_grant_permission("writer", own(PermissionType::Readwrite))
        .await
        .unwrap();
    root.role_grant_permission("reader", own(PermissionType::Read))
        .await
        .unwrap();
    root.auth_enable().await.unwrap();
}

pub async fn user(etcd: &Etcd, user: &str) -> Result<Registry, RegistryError> {
    user_at(etcd.endpoints(), user).await
}

pub async fn user_at(endpoints: Vec<String>, user: &str) -> Result<Registry, RegistryError> {
    Registry::builder(endpoints)
        .user(user, format!("{user}-password"))
        .connect()
        .await
}

/// Returns a client of the user root. It works whether authentication is enabled or disabled.
pub async fn root(etcd: &Etcd) -> Client {
    let options = ConnectOptions::new()
        .with_user("root", "root-password")
        .with_auto_token_refresh(true);
    match Client::connect(etcd.endpoints(), Some(options)).await {
        Ok(client) => client,
        Err(_) => client(etcd).await,
    }
}
