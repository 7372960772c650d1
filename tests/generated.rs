//! The tests of `tonic-balance` use generated code for the greeter service. This code is checked in, because `tonic-balance` builds without
//! `protoc`. The test compares it with the output of `protoc`.
#![allow(clippy::panic, reason = "a failed step is a failed test")]

#[test]
fn the_checked_in_greeter_matches_the_output_of_protoc() {
    let generated = include_str!(concat!(env!("OUT_DIR"), "/helloworld.rs"));
    let checked_in = include_str!("../balance/src/channel/tests/greeter/helloworld.rs");
    let without_blanks = |text: &str| text.split_whitespace().collect::<String>();
    assert!(
        without_blanks(generated) == without_blanks(checked_in),
        "the checked-in code differs: copy target/debug/build/tonic-etcd-*/out/helloworld.rs to balance/src/channel/tests/greeter/"
    );
}
