//! `aggregator token` and `revoke`: who may take part.

use commonweal_protocol::{DeviceId, Host, Invitation, Token};
use rand::RngCore;
use serde_json::json;

use super::{CliError, Opened, now_ms, say, say_json};
use crate::receive::enroll::Registry;

/// Longest that an invitation can be used: ten years.
const EXPIRES_DAYS_MAX: u64 = 3_650;
/// Most invitations of one call.
const COUNT_MAX: u32 = 10_000;

#[derive(Debug, clap::Args)]
pub(super) struct TokenVerb {
    /// How many.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(COUNT_MAX)))]
    count: u32,
    /// How long they can be used: a number and s, m, h or d.
    #[arg(long, default_value = "1h", value_parser = duration)]
    expires: u64,
    /// Withdraw this invitation, at once, in place of printing any; a device that has used it is revoked by its name.
    #[arg(long, value_name = "INVITATION", conflicts_with_all = ["count", "expires", "revoke_all"])]
    revoke: Option<String>,
    /// Withdraw every invitation that nobody has used.
    #[arg(long, conflicts_with_all = ["count", "expires"])]
    revoke_all: bool,
}

const DAY_SECONDS: u64 = 86_400;

fn duration(text: &str) -> Result<u64, String> {
    let wrong = || format!("expected a number and s, m, h or d, such as 30m, got `{text}`");
    let (digits, unit) = text.split_at(text.len() - text.chars().last().map_or(0, char::len_utf8));
    let seconds: u64 = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => DAY_SECONDS,
        _ => return Err(wrong()),
    };
    let count: u64 = digits.parse().map_err(|_| wrong())?;
    let most_ms = EXPIRES_DAYS_MAX * DAY_SECONDS * 1_000;
    match count.checked_mul(seconds * 1_000) {
        Some(0) => Err(wrong()),
        Some(duration_ms) if duration_ms <= most_ms => Ok(duration_ms),
        _ => Err(format!("expected at most {EXPIRES_DAYS_MAX}d, got `{text}`")),
    }
}

/// Withdraws what the flags say, if they say so; how many.
fn withdraw(registry: &Registry, verb: &TokenVerb) -> Result<Option<usize>, CliError> {
    let Some(text) = &verb.revoke else {
        return Ok(if verb.revoke_all { Some(registry.withdraw_all(now_ms())?) } else { None });
    };
    // Without its words, which hold the token.
    let invitation: Invitation = text
        .parse()
        .map_err(|error| CliError::Input(format!("--revoke: expected an invitation: {error}")))?;
    registry.withdraw(&invitation.token, now_ms())?;
    Ok(Some(1))
}

pub(super) fn token(opened: &Opened, verb: &TokenVerb, json: bool) -> Result<(), CliError> {
    let registry = Registry::new(opened.storage.coord.clone());
    if let Some(count) = withdraw(&registry, verb)? {
        if json {
            return say_json(&json!({ "event": "withdrawn", "invitations": count }));
        }
        say(&format!("invitations withdrawn: {count}; whoever comes with one is refused from now on"));
        return Ok(());
    }
    let address = opened.config.address.clone().unwrap_or_else(|| opened.config.listen.to_string());
    let wrong = || {
        CliError::Input(format!(
            "address: expected HOST:PORT that devices can reach, got `{address}`; set it with --address at init"
        ))
    };
    let (host, port) = address.rsplit_once(':').ok_or_else(wrong)?;
    let host: Host = host.trim_matches(['[', ']']).parse().map_err(|_| wrong())?;
    let port: u16 = port.parse().map_err(|_| wrong())?;
    let authority = opened.directory.authority()?.digest();
    let now_ms = now_ms();
    let expires_ms = now_ms.saturating_add(verb.expires);
    let mut invitations = Vec::new();
    for _ in 0..verb.count {
        let mut token = Token([0; 32]);
        rand::rng().fill_bytes(&mut token.0);
        registry.invite(&token, now_ms, expires_ms)?;
        invitations.push(Invitation { host: host.clone(), port, token, authority }.to_string());
    }
    if json {
        return say_json(
            &json!({ "event": "invited", "invitations": invitations, "expires_ms": expires_ms }),
        );
    }
    for invitation in invitations {
        say(&invitation);
    }
    Ok(())
}

pub(super) fn revoke(opened: &Opened, device: &str, json: bool) -> Result<(), CliError> {
    let id: DeviceId =
        device.parse().map_err(|error| CliError::Input(format!("device `{device}`: {error}")))?;
    Registry::new(opened.storage.coord.clone()).revoke(&id, now_ms())?;
    if json {
        return say_json(&json!({ "event": "revoked", "device": id }));
    }
    say(&format!("device {id} is refused from its next request on, and what it sent is no longer merged"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_a_unit() {
        assert_eq!(duration("90s"), Ok(90_000));
        assert_eq!(duration("2d"), Ok(172_800_000));
        assert_eq!(duration("3650d"), Ok(315_360_000_000));
        for long in ["3651d", "213503982334d", "18446744073709551615s"] {
            assert!(duration(long).unwrap_err().contains("at most 3650d"), "{long}");
        }
        for wrong in ["", "h", "5", "1w", "-1h", "0h", "99999999999999999d", "1é"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
