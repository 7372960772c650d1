//! Generates the code of the service channelz.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto/channelz.proto");
    tonic_prost_build::configure()
        .build_client(false)
        .build_transport(false)
        .compile_protos(&["proto/channelz.proto"], &["proto"])?;
    Ok(())
}
