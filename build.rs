//! Compiles the services of the examples and tests. Crates that depend on the library build nothing
//! here: the feature is off for them.

#[cfg(feature = "helloworld")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    for proto in [
        "proto/helloworld.proto",
        // The published package has no tests.
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
