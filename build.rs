//! Compiles the greeter of the examples and tests. Crates that depend on the library build nothing
//! here: the feature is off for them.

#[cfg(feature = "helloworld")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto/helloworld.proto");
    Ok(tonic_prost_build::compile_protos("proto/helloworld.proto")?)
}

#[cfg(not(feature = "helloworld"))]
fn main() {
    println!("cargo::rerun-if-changed=build.rs");
}
