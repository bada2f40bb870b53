//! What must hold for any bytes at all. Run by `../fuzz.rs` and by the targets in `fuzz/`.

use commonweal_runtime::{ChatTemplate, Devices, Message, SpecialTokens};

/// A chat template does not parse, fails, or renders the same text twice; none takes for ever or all of the memory.
pub(crate) fn template(bytes: &[u8]) {
    let Ok(source) = std::str::from_utf8(bytes) else { return };
    let special =
        SpecialTokens { bos_token: "<s>".into(), eos_token: "</s>".into(), pad_token: "</s>".into() };
    let template = match ChatTemplate::parse(source, special) {
        Ok(template) => template,
        Err(error) => return assert!(error.to_string().contains("chat template"), "{error}"),
    };
    let messages = [Message::system("be brief"), Message::user("1 < 2?\n"), Message::assistant("yes")];
    for (count, asks) in [(3, false), (2, true), (0, true)] {
        match template.render(&messages[..count], asks) {
            Ok(text) => assert_eq!(template.render(&messages[..count], asks).ok(), Some(text)),
            Err(error) => assert!(error.to_string().contains("chat template"), "{error}"),
        }
    }
}

/// A list of devices is refused with an error that can be shown, or is written and read again.
pub(crate) fn devices(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match text.parse::<Devices>() {
        Ok(devices) => assert_eq!(devices.to_string().parse(), Ok(devices)),
        Err(error) => assert!(error.to_string().len() < 6 * text.len() + 300, "{error}"),
    }
}
