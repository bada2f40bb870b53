//! `devices`: what the runtime library offers, and which device the settings come to for the package.

use anyhow::Result;
use serde_json::json;

use super::{Shared, open};
use crate::events::Output;

pub(super) fn devices(shared: &Shared) -> Result<()> {
    let place = open::Place::find(shared)?;
    let library = open::load_library(shared, &place)?;
    let offers = library.offers()?;
    let output = shared.output();
    if output == Output::Text {
        output.say(&format!("the library {} offers", library.path().display()));
        for offer in &offers {
            let kind = offer.kind.unwrap_or("–");
            output.say(&format!(
                "  {:28} {kind:4} {}",
                offer.provider,
                offer.vendor.as_deref().unwrap_or("")
            ));
        }
    }
    let package = open::open_package(shared, &place)?;
    let (_, choice) = library.choose(&open::devices(shared, &place), &package)?;
    match output {
        Output::Text => output.say(&choice),
        Output::Json => {
            let offers: Vec<_> = offers
                .iter()
                .map(|offer| json!({"provider": offer.provider, "kind": offer.kind, "vendor": offer.vendor}))
                .collect();
            output.say(&json!({
                "library": library.path(), "offers": offers, "device": choice.device.to_string(), "why": choice.why,
            }));
        }
    }
    Ok(())
}
