//! The fuzz targets over their seeds and over mutations that are the same on every run.
#![allow(clippy::unwrap_used, reason = "a failed test may panic")]

#[path = "../../../fuzz/mutate.rs"]
mod mutate;
#[path = "fuzz/targets.rs"]
mod targets;

use commonweal_runtime::{ChatTemplate, Message, SpecialTokens};

#[test]
fn template() {
    mutate::run("template", 3_000, targets::template);
}

#[test]
fn devices() {
    mutate::run("devices", 20_000, targets::devices);
}

/// minijinja 2.24 panics there.
#[test]
fn an_empty_list_that_is_read_backwards_ends_nobody() {
    let source = "{% for message in messages[::-1] %}{{ message.content }}{% endfor %}";
    let template = ChatTemplate::parse(source, SpecialTokens::default()).unwrap();
    assert_eq!(template.render(&[Message::user("a"), Message::user("b")], true).unwrap(), "ba");
    let rendered = template.render(&[], true);
    assert!(rendered.is_err_and(|error| error.to_string().contains("does not render 0 messages")));
}

/// Each of these asked for as much memory as it named, and ended the process.
#[test]
fn a_template_cannot_ask_for_any_amount_of_memory() {
    for source in [
        "{{ [1] | batch(99999999999) | length }}",
        "{{ [1] | slice(99999999999) | length }}",
        "{{ 'a\\nb' | indent(99999999999) | length }}",
        "{{ '%99999999999d' | format(1) | length }}",
        "{{ '{:>99999999999}'.format(1) | length }}",
        "{{ '%.99999999999f' | format(1.5) | length }}",
        "{{ '%(a)99999999999d' | format(a=1) | length }}",
        "{{ '%*d' | format(99999999999, 1) | length }}",
        "{{ 'a%%%99999999999d' | format(1) | length }}",
    ] {
        let template = ChatTemplate::parse(source, SpecialTokens::default()).unwrap();
        let error = template.render(&[Message::user("a")], true).unwrap_err();
        assert!(error.to_string().contains("does not render"), "{source}: {error}");
    }
    for (source, text) in [
        ("{{ [1, 2, 3] | batch(2) | list | length }}", "2"),
        ("{{ [1, 2, 3] | slice(2) | list | length }}", "2"),
        ("{{ 'a\\nb' | indent(2) }}", "a\n  b"),
        ("{{ '%03d' | format(7) }}", "007"),
        ("{{ '{:>3}'.format(7) }}", "  7"),
        ("{{ '**%s** 20261129' | format('a') }}", "**a** 20261129"),
        ("{{ '* {} 20261129'.format('a') }}", "* a 20261129"),
    ] {
        let template = ChatTemplate::parse(source, SpecialTokens::default()).unwrap();
        assert_eq!(template.render(&[], true).unwrap(), text, "{source}");
    }
}
