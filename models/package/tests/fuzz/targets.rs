//! What must hold for any bytes at all. Run by `../fuzz.rs` and by the targets in `fuzz/`.

use commonweal_package::{EncoderManifest, Manifest, ManifestError};

/// A `package.toml` is refused shortly, or means the same when it is written and read again.
pub(crate) fn manifest(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match Manifest::parse(text) {
        Ok(manifest) => {
            let written = toml::to_string(&manifest).expect("a manifest has a form");
            assert_eq!(Manifest::parse(&written).expect("it is read again"), manifest);
            let layout = manifest.layout().expect("it was checked");
            assert_eq!(layout.layers(), manifest.model.layers);
            assert!(manifest.model.rotary_frequencies().iter().all(|frequency| frequency.is_finite()));
        }
        // The base is a hash that mutations would never meet, so it is put right here.
        Err(ManifestError::Base { expected, got }) => again(text, &expected.to_string(), &got.to_string()),
        Err(error) => short(&error, text),
    }
    match EncoderManifest::parse(text) {
        Ok(encoder) => {
            let written = toml::to_string(&encoder).expect("a manifest has a form");
            assert_eq!(EncoderManifest::parse(&written).expect("it is read again"), encoder);
        }
        Err(ManifestError::Base { expected, got }) => {
            let right = text.replacen(&got.to_string(), &expected.to_string(), 1);
            if let Ok(encoder) = EncoderManifest::parse(&right) {
                let written = toml::to_string(&encoder).expect("a manifest has a form");
                assert_eq!(EncoderManifest::parse(&written).expect("it is read again"), encoder);
            }
        }
        Err(error) => short(&error, text),
    }
}

fn again(text: &str, expected: &str, got: &str) {
    let right = text.replacen(got, expected, 1);
    // Not if the hash is written in capitals, or stands first in another place.
    if right != text && !matches!(Manifest::parse(&right), Err(ManifestError::Base { .. })) {
        manifest(right.as_bytes());
    }
}

/// A cause may show the line that it is about.
fn short(error: &ManifestError, text: &str) {
    let told = error.to_string();
    assert!(told.contains("package.toml") && told.len() < text.len() + 4096, "{told}");
}
