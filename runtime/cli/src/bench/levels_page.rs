//! What was measured at every level of fusion, as a section of a page.

use super::drawing::{GREY, INK, WIDTH, bar, key, label, section, shortened, svg};
use super::figure;
use super::levels::ByLevel;

/// Colours of the levels of fusion with what they are, the most first.
const LEVELS: [(&str, &str); 3] =
    [("#1f6feb", "full fusion"), ("#9aa4b2", "one kernel per composite"), ("#d3d9e0", "one kernel per primitive")];

/// Colour of other libraries.
const OTHER: &str = "#e0a100";

/// The section; `what` is what a bar is the time of.
pub fn section_of(what: &str, rows: &[ByLevel]) -> String {
    let keys: String = LEVELS.iter().map(|(colour, text)| key(colour, text)).collect();
    section(
        "Fused, one kernel per composite, and none",
        &format!(
            "{what}; shorter is better. Predicted is what the bytes saved take at the rate of the best copy. {keys}"
        ),
        &bars(rows),
    )
}

/// Where names end, where bars of time begin and how long they are, where gains stand, and where bars of bytes begin.
const NAMES: f64 = 282.0;
const TIME: (f64, f64) = (296.0, 176.0);
const GAIN: f64 = 640.0;
const BYTES: (f64, f64) = (852.0, 104.0);

/// Height of a bar with the room below it, and of a line of words.
const BAR: f64 = 20.0;
const LINE: f64 = 16.0;

/// Bars of all levels of each row, as long as their part of the largest: of time, and of elementwise bytes.
fn bars(rows: &[ByLevel]) -> String {
    let (mut body, mut y) = (String::new(), 28.0);
    for (x, text) in [(TIME.0, "time"), (GAIN, "gained by full fusion"), (BYTES.0, "elementwise bytes")] {
        body += &label(x, 14.0, "start", "400", GREY, text);
    }
    for row in rows {
        body += &label(NAMES, y + 13.0, "end", "600", INK, &row.name);
        let sizes = if row.sizes.is_empty() { Vec::new() } else { wrapped(&row.sizes, 42) };
        for (i, part) in sizes.iter().enumerate() {
            body += &label(NAMES, y + 31.0 + LINE * i as f64, "end", "400", GREY, part);
        }
        let top = y;
        let seconds = row.levels.iter().map(|l| l.seconds).chain(row.others.iter().map(|o| o.seconds));
        let slowest = seconds.fold(0.0, f64::max);
        let most = row.levels.iter().map(|l| l.elementwise_bytes).max().unwrap_or(0).max(1) as f64;
        let mut draw = |(x, room): (f64, f64), part: f64, colour: &str, y: f64, text: &str| {
            body += &bar(x, y, room * part, BAR - 4.0, colour);
            body += &label(x + room * part + 8.0, y + 13.0, "start", "400", INK, text);
        };
        let mut gains = Vec::new();
        for (i, (level, (colour, _))) in row.levels.iter().zip(LEVELS).enumerate() {
            let mut text = format!("{} ms", figure(level.seconds * 1e3));
            if i > 0 {
                text += &format!(", {} × full", figure(1.0 / level.full_by_this));
                let [gained, predicted] = [level.gained(), level.predicted_gain].map(|s| figure(s * 1e3));
                gains.push((y, format!("{gained} ms, {predicted} predicted")));
            }
            draw(TIME, level.seconds / slowest, colour, y, &text);
            let mb = format!("{} MB", figure(level.elementwise_bytes as f64 / 1e6));
            draw(BYTES, level.elementwise_bytes as f64 / most, colour, y, &mb);
            y += BAR;
        }
        for other in &row.others {
            let text = format!("{} ms, {}", figure(other.seconds * 1e3), other.name);
            draw(TIME, other.seconds / slowest, OTHER, y, &text);
            y += BAR;
        }
        for (y, text) in gains {
            body += &label(GAIN, y + 13.0, "start", "400", INK, &text);
        }
        for [level, why] in &row.missing {
            let room = ((WIDTH - TIME.0) / 7.0) as usize;
            let text = shortened(&format!("{level}: {why}"), room);
            body += &label(TIME.0, y + 13.0, "start", "400", GREY, &text);
            y += BAR;
        }
        y = y.max(top + 22.0 + LINE * sizes.len() as f64) + 18.0;
    }
    svg(y - 8.0, &body)
}

/// Lines of at most `width` characters, cut between words.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.chars().count() + word.chars().count() < width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.into()),
        }
    }
    lines
}
