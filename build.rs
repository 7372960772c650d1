//! Generates the code for the gRPC services of the examples and tests. If this package is built as a dependency, the feature `helloworld`
//! is off, and nothing is generated.

#[cfg(feature = "helloworld")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    for proto in [
        "proto/helloworld.proto",
        // The published package has no tests and does not contain this file.
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
