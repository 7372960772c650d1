//! Generates the code for the gRPC services of the examples and tests. For a crate that depends on the
//! library, the feature `helloworld` is off, and this script does nothing.

#[cfg(feature = "helloworld")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    for proto in [
        "proto/helloworld.proto",
        // This file is missing in the published package, which has no tests.
        "tests/interop_peers/proto/interop.proto",
    ] {
        if std::path::Path::new(proto).exists() {
            println!("cargo::rerun-if-changed={proto}");
            tonic_prost_build::compile_protos(proto)?;
        }
    }
    Ok(())
}

#[cfg(not(feature = "helloworld"))]
fn main() {
    println!("cargo::rerun-if-changed=build.rs");
}
