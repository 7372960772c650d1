//! Whether a server is ready: it is registered, and not taken out of service.

use tokio::sync::watch;
use tracing::Instrument;

use crate::registration::RegistrationState;

/// The name in the health service whose status is the readiness.
pub(super) const READINESS: &str = "readiness";

/// Starts a task that follows the states of a registration. The task ends when the registration has ended, or when every receiver is
/// dropped. The receiver is then closed.
pub(super) fn follow(mut states: watch::Receiver<RegistrationState>) -> watch::Receiver<bool> {
    let (sender, receiver) = watch::channel(false);
    let following = async move {
        loop {
            let ready = is_ready(*sender.borrow(), &states.borrow_and_update());
            sender.send_if_modified(|before| std::mem::replace(before, ready) != ready);
            tokio::select! {
                changed = states.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
                () = sender.closed() => return,
            }
        }
    };
    tokio::spawn(following.in_current_span());
    receiver
}

/// Returns whether a server is ready after a change of its registration's state. A server that was registered remains ready while it
/// registers again. Otherwise an outage of etcd would make all servers unready at once, although they serve and clients use them.
fn is_ready(before: bool, state: &RegistrationState) -> bool {
    match state {
        RegistrationState::Registered { .. } => true,
        RegistrationState::Registering { .. } => before,
        RegistrationState::Superseded { .. }
        | RegistrationState::Leaving { .. }
        | RegistrationState::Paused
        | RegistrationState::Deregistered
        | RegistrationState::Aborted => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REGISTERING: RegistrationState = RegistrationState::Registering { last_error: None };

    fn registered() -> RegistrationState {
        RegistrationState::Registered {
            lease: 7.into(),
            expires: tokio::time::Instant::now(),
            last_error: None,
        }
    }

    #[test]
    fn a_server_is_ready_from_its_first_registration_until_it_is_taken_out_of_service() {
        assert!(!is_ready(false, &REGISTERING), "before the registration");
        assert!(is_ready(false, &registered()));
        assert!(is_ready(true, &REGISTERING), "an outage must not count");
        for state in [
            RegistrationState::Paused,
            RegistrationState::Leaving { last_error: None },
            RegistrationState::Superseded { lease: None },
            RegistrationState::Deregistered,
            RegistrationState::Aborted,
        ] {
            assert!(!is_ready(true, &state), "{state}");
        }
    }

    #[tokio::test]
    async fn the_readiness_follows_the_states_and_closes_at_their_end() {
        let (states, receiver) = watch::channel(REGISTERING);
        let mut ready = follow(receiver);
        states.send_replace(registered());
        assert!(ready.wait_for(|ready| *ready).await.is_ok());
        states.send_replace(RegistrationState::Paused);
        assert!(ready.wait_for(|ready| !*ready).await.is_ok());
        drop(states);
        assert!(ready.changed().await.is_err());
    }
}
