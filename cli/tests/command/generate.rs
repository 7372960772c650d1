//! `completions` and `man`.

use super::support::{bare, outcome};

#[tokio::test]
async fn completions_and_the_manual_page_cover_every_command() {
    let scripts = ["bash", "zsh", "fish"].map(|shell| vec!["completions", shell]);
    for arguments in scripts.into_iter().chain([vec!["man"]]) {
        let generated = outcome(bare(&arguments)).await;
        assert_eq!(generated.code, Some(0), "{generated:?}");
        for command in ["services", "doctor", "register", "watch", "drain", "call"] {
            assert!(
                generated.stdout.contains(command),
                "{arguments:?}: {command}"
            );
        }
    }
    let page = outcome(bare(&["man"])).await.stdout;
    for nested in [
        "tonic\\-etcd config set",
        "\\-\\-revision",
        "\\-\\-dry\\-run",
    ] {
        assert!(page.contains(nested), "{nested}");
    }
}
