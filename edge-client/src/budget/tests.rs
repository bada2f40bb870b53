//! Tests of `budget.rs`.

use jiff::{civil::date, tz::TimeZone};
use proptest::prelude::*;

use super::ledger::DATES_MAX;
use super::*;

const MB: u64 = 1_000_000;

fn budget(day: u64, month: u64) -> BudgetPolicy {
    let of = |mb: u64| if mb == 0 { Limit::OFF } else { Limit::of(mb * MB) };
    BudgetPolicy {
        bytes_per_day: of(day),
        bytes_per_month: of(month),
        metered_bytes_per_day: Limit::OFF,
        metered_bytes_per_month: Limit::OFF,
        ..BudgetPolicy::default()
    }
}

/// At noon.
fn noon(day: Date) -> ZonedDateTime {
    day.at(12, 0, 0, 0).to_zoned_datetime(TimeZone::UTC).unwrap()
}

fn ms(day: Date) -> u64 {
    day.to_zoned_datetime(TimeZone::UTC).unwrap().timestamp().as_millisecond() as u64
}

fn of(dates: &[(Date, u64)]) -> Ledger {
    let mut ledger = Ledger::default();
    for &(day, mb) in dates {
        ledger.look(day);
        ledger.charge(day, mb * MB, false);
    }
    ledger
}

fn waits(budget: &BudgetPolicy, ledger: &Ledger, today: Date, wish: Wish) -> Option<Wait> {
    decide(budget, ledger, &noon(today), false, wish).err()
}

#[test]
fn a_day_that_is_used_up_is_waited_for_and_told_in_a_sentence() {
    let (today, budget) = (date(2026, 11, 30), budget(200, 0));
    let ledger = of(&[(date(2026, 11, 29), 200), (today, 198)]);
    assert_eq!(waits(&budget, &ledger, today, Wish::GoOn(2 * MB)), None);
    let wait = waits(&budget, &ledger, today, Wish::Begin(5 * MB)).unwrap();
    let text = "until tomorrow: 198MB of today's 200MB are used, 5MB more are needed";
    assert_eq!((wait.reason.as_str(), wait.until_ms), (text, ms(date(2026, 12, 1))));
    let spent = of(&[(today, 200)]);
    let wait = waits(&budget, &spent, today, Wish::GoOn(1)).unwrap();
    assert_eq!(wait.reason, "until tomorrow: 200MB of today's 200MB are used");
    assert_eq!(waits(&budget, &spent, date(2026, 12, 1), Wish::GoOn(200 * MB)), None);
}

#[test]
fn a_months_end_is_waited_for_over_a_days() {
    let budget = budget(200, 500);
    let ledger = of(&[(date(2026, 11, 1), 200), (date(2026, 11, 2), 200), (date(2026, 11, 3), 100)]);
    let wait = waits(&budget, &ledger, date(2026, 11, 4), Wish::GoOn(1)).unwrap();
    assert_eq!(wait.reason, "until 2026-12-01: 500MB of this month's 500MB are used");
    assert_eq!(wait.until_ms, ms(date(2026, 12, 1)));
    assert_eq!(waits(&budget, &ledger, date(2026, 12, 1), Wish::GoOn(MB)), None);
}

#[test]
fn metered_networks_have_their_own_limit_beside_the_common_one() {
    let (today, mut budget) = (date(2026, 2, 28), budget(200, 0));
    budget.metered_bytes_per_day = Limit::of(20 * MB);
    let mut ledger = of(&[(today, 100)]);
    ledger.charge(today, 20 * MB, true);
    let on = |is_metered| decide(&budget, &ledger, &noon(today), is_metered, Wish::GoOn(MB)).err();
    assert_eq!(on(false), None);
    let text = "until tomorrow: 20MB of today's 20MB for metered networks are used";
    assert_eq!(on(true).unwrap().reason, text);
    let used = Used::of(&ledger, today);
    assert_eq!((used.bytes_today, used.metered_bytes_month), (120 * MB, 20 * MB));
    let told = used.sentence(&budget);
    assert!(
        told.starts_with("120MB of 200MB today, 120MB this month; on metered networks 20MB of 20MB"),
        "{told}"
    );
}

#[test]
fn what_no_day_has_room_for_begins_when_most_of_one_is_left() {
    let (today, budget) = (date(2026, 6, 1), budget(200, 0));
    let begins = |used| waits(&budget, &of(&[(today, used)]), today, Wish::Begin(900 * MB)).is_none();
    assert!(begins(50) && !begins(51));
}

#[test]
fn a_day_ends_at_midnight_where_the_device_is() {
    let tokyo = TimeZone::get("Asia/Tokyo").unwrap_or_else(|_| jiff::tz::offset(9).to_time_zone());
    let now = date(2026, 6, 1).at(23, 0, 0, 0).to_zoned_datetime(tokyo).unwrap();
    let wait = decide(&budget(200, 0), &of(&[(now.date(), 200)]), &now, false, Wish::GoOn(1)).unwrap_err();
    assert_eq!(wait.until_ms, now.timestamp().as_millisecond() as u64 + 3_600_000);
}

/// 2099 by mistake, and back: what was moved then counts for today, what is too much of that for tomorrow, and the day
/// of 2099 gives nothing twice.
#[test]
fn a_clock_that_goes_back_gives_no_bytes_twice() {
    let (today, far, budget) = (date(2026, 11, 29), date(2099, 1, 1), budget(200, 0));
    let mut ledger = of(&[(today, 200)]);
    assert_eq!(waits(&budget, &ledger, far, Wish::GoOn(200 * MB)), None, "nobody can know");
    ledger.charge(far, 200 * MB, false);
    for _ in 0..2 {
        ledger.look(today);
        for day in [today, today.tomorrow().unwrap(), far] {
            assert!(waits(&budget, &ledger, day, Wish::GoOn(1)).is_some(), "{day}");
        }
        let later = date(2026, 12, 1);
        assert_eq!(waits(&budget, &ledger, later, Wish::GoOn(200 * MB)), None);
        ledger.look(far);
    }
    // A westward flight: the same date again, then the next is used up and the one after is not.
    let next = today.tomorrow().unwrap();
    let mut ledger = of(&[(today, 200), (next, 200)]);
    ledger.look(today);
    let is_free = |day| waits(&budget, &ledger, day, Wish::GoOn(200 * MB)).is_none();
    assert!(!is_free(today) && !is_free(next) && is_free(date(2026, 12, 1)));
}

#[test]
fn an_owner_who_lowers_a_limit_is_owed_nothing_of_the_days_before() {
    let ledger = of(&[(date(2026, 11, 28), 900), (date(2026, 11, 29), 10)]);
    assert_eq!(waits(&budget(50, 0), &ledger, date(2026, 11, 29), Wish::GoOn(40 * MB)), None);
}

#[test]
fn an_account_that_cannot_be_read_leaves_nothing_of_today() {
    let (today, budget) = (date(2026, 11, 15), budget(200, 600));
    let ledger = Ledger::unknown(&budget, today);
    assert!(waits(&budget, &ledger, today, Wish::GoOn(1)).is_some());
    let tomorrow = date(2026, 11, 16);
    assert_eq!(waits(&budget, &ledger, tomorrow, Wish::GoOn(200 * MB)), None);
    assert_eq!(ledger.left(&budget, tomorrow, false), 200 * MB);
    let used = Used::of(&ledger, today);
    assert_eq!((used.bytes_today, used.bytes_month), (200 * MB, 300 * MB));
    assert!(
        waits(&budget, &Ledger::unknown(&budget, date(2026, 11, 1)), date(2026, 11, 1), Wish::GoOn(1))
            .is_some()
    );
}

#[test]
fn an_account_is_read_as_it_was_written_and_has_a_bound() {
    let mut ledger = of(&[(date(2026, 11, 28), 1), (date(2026, 12, 1), 2)]);
    ledger.look(date(2026, 11, 29));
    let text = serde_json::to_string(&ledger).unwrap();
    assert!(text.contains(r#"{"date":"2026-11-28","moved":{"all":1000000,"metered":0}}"#), "{text}");
    assert_eq!(serde_json::from_str::<Ledger>(&text).unwrap().check().unwrap(), ledger);
    let swapped = Ledger { dates: ledger.dates.iter().rev().copied().collect() };
    assert!(swapped.check().unwrap_err().contains("order"));
    let mut day = date(2026, 1, 1);
    for _ in 0..400 {
        ledger.charge(day, 1, false);
        day = day.tomorrow().unwrap();
    }
    assert_eq!(ledger.dates.len(), DATES_MAX);
    assert!(serde_json::to_string(&ledger).unwrap().len() < 16 * 1024);
    let many = Ledger { dates: vec![ledger.dates[0]; DATES_MAX + 1] };
    assert!(many.check().is_err());
}

#[test]
fn a_clock_that_was_wrong_for_long_does_not_empty_the_month() {
    let budget = budget(100, 300);
    let dates = [10, 11, 12].map(|day| (date(2026, 11, day), 100));
    for wrong in [date(2099, 1, 1), date(2026, 12, 1), date(2001, 5, 5)] {
        let mut ledger = of(&dates);
        let mut day = wrong;
        for _ in 0..400 {
            ledger.look(day);
            ledger.charge(day, 1, false);
            day = day.tomorrow().unwrap();
        }
        assert!(ledger.dates.len() <= DATES_MAX);
        for day in 13..=30 {
            let today = date(2026, 11, day);
            ledger.look(today);
            let wait = waits(&budget, &ledger, today, Wish::GoOn(MB)).unwrap();
            assert!(wait.reason.contains("this month's 300MB are used"), "{wrong}: {wait}");
            ledger.charge(today, 1, false);
        }
    }
}

/// The limits by hand: of each date that the clock has shown, and of each month.
fn moved_on(moves: &[(Date, u64)], is_it: impl Fn(Date) -> bool) -> u64 {
    moves.iter().filter(|(day, _)| is_it(*day)).map(|(_, bytes)| bytes).sum()
}

proptest! {
    /// Whatever is wanted and however the clock jumps, no date and no month that it shows has more than its limit, and
    /// all that was moved is in the account.
    #[test]
    fn no_date_has_more_than_its_limit(
        steps in prop::collection::vec((0i64..40, 0u64..250 * MB, any::<bool>()), 1..60),
        (day, month) in (16u64..300, 16u64..900),
    ) {
        let budget = budget(day, month);
        let (mut ledger, mut moves) = (Ledger::default(), Vec::new());
        for (ahead, bytes, is_whole) in steps {
            let today = date(2026, 11, 10).checked_add(jiff::SignedDuration::from_hours(24 * ahead)).unwrap();
            ledger.look(today);
            let wish = if is_whole { Wish::Begin(bytes) } else { Wish::GoOn(bytes) };
            let bytes = bytes.min(ledger.left(&budget, today, false));
            if decide(&budget, &ledger, &noon(today), false, wish).is_ok() {
                ledger.charge(today, bytes, false);
                moves.push((today, bytes));
            }
            prop_assert!(moved_on(&moves, |one| one == today) <= day * MB);
            prop_assert!(moved_on(&moves, |one| one.first_of_month() == today.first_of_month()) <= month * MB);
            let kept: u64 = ledger.dates.iter().map(|entry| entry.moved.all).sum();
            prop_assert_eq!(kept, moved_on(&moves, |_| true));
            let text = serde_json::to_string(&ledger).unwrap();
            prop_assert_eq!(&serde_json::from_str::<Ledger>(&text).unwrap().check().unwrap(), &ledger);
        }
    }

    /// A clock that goes back and back, past more dates than an account has: no date and no month that it shows has more
    /// than its limit, and nothing that was moved is forgotten.
    #[test]
    fn a_clock_that_goes_back_for_long_empties_no_month(
        steps in prop::collection::vec((-3i64..=1, 0u64..250 * MB), 80..160),
        (day, month) in (16u64..300, 16u64..900),
    ) {
        let budget = budget(day, month);
        let (mut ledger, mut moves) = (Ledger::default(), Vec::<(Date, u64)>::new());
        let mut today = date(2026, 11, 10);
        for (ahead, bytes) in steps {
            today = today.checked_add(jiff::SignedDuration::from_hours(24 * ahead)).unwrap();
            ledger.look(today);
            let bytes = bytes.min(ledger.left(&budget, today, false));
            ledger.charge(today, bytes, false);
            moves.push((today, bytes));
            prop_assert!(moved_on(&moves, |one| one == today) <= day * MB);
            prop_assert!(moved_on(&moves, |one| one.first_of_month() == today.first_of_month()) <= month * MB);
            let kept: u64 = ledger.dates.iter().map(|entry| entry.moved.all).sum();
            prop_assert_eq!(kept, moved_on(&moves, |_| true));
            prop_assert!(ledger.dates.len() <= DATES_MAX);
            prop_assert!(ledger.clone().check().is_ok());
        }
    }

    /// A clock that went wrong for a while and then runs as it should: what it gave too much is taken from the days that
    /// follow, all of it, and then the days are whole again.
    #[test]
    fn what_a_wrong_clock_gave_is_taken_back(jumps in prop::collection::vec(1i64..2000, 1..6)) {
        let budget = budget(200, 0);
        let mut ledger = Ledger::default();
        let mut today = date(2026, 1, 1);
        let whole = |ledger: &mut Ledger, day| {
            ledger.look(day);
            let bytes = ledger.left(&budget, day, false);
            ledger.charge(day, bytes, false);
            bytes
        };
        let mut moved = 0;
        for jump in jumps.iter().copied() {
            moved += whole(&mut ledger, today);
            let wrong = today.checked_add(jiff::SignedDuration::from_hours(24 * jump)).unwrap();
            moved += whole(&mut ledger, wrong);
        }
        let mut days = 1;
        // No more than the wrong dates that were shown in the meantime: then there is nothing left to take back.
        for _ in 0..=2 * jumps.len() {
            today = today.tomorrow().unwrap();
            days += 1;
            moved += whole(&mut ledger, today);
        }
        prop_assert!(moved <= days * 200 * MB, "{moved} in {days} days");
        prop_assert!(moved >= (days - 2 * jumps.len() as u64) * 200 * MB, "{moved} in {days} days");
    }
}
