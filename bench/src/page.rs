//! The results of a suite as one page that needs nothing else: how far each component comes with fusion, where kernels
//! stand under the roofline of the device, and what each of them reaches.

use std::fmt::Write;

use ltxc::bench::drawing::{
    ARITHMETIC, GREY, INK, MEMORY, WIDTH, bar, escape, foot, head, key, label, operations, quarters, section,
    shortened, svg,
};
use ltxc::bench::{figure, levels_page};

use crate::kernels::KernelRow;
use crate::suite::{Suite, percent};

/// Kernels whose bars are drawn.
const MOST_BARS: usize = 28;

/// Where bars begin.
const LABEL: f64 = 400.0;

/// The page.
pub fn html(suite: &Suite) -> String {
    let lines = [suite.what.clone(), format!("{} · {}", suite.machine, suite.date)];
    let mut out = head(&format!("ltxc on {}", suite.device.join(": ")), &lines, &tiles(suite));
    if !suite.components.is_empty() {
        put(&mut out, levels_page::section_of("One run of each component", &suite.components));
    }
    if !suite.kernels.is_empty() {
        let colours = format!("{}{}", key(MEMORY, "limited by memory"), key(ARITHMETIC, "limited by arithmetic"));
        put(
            &mut out,
            section(
                "Roofline",
                &format!(
                    "Each circle is a kernel, its area the time that a run of its component spends in it. The line is what \
                     this device was measured to do at best. {colours}"
                ),
                &roofline(suite),
            ),
        );
        put(
            &mut out,
            section(
                "Kernels",
                &format!(
                    "Part of the device's measured ceiling, the kernels with the most time first; behind it how many times \
                     as fast a fused call is as its parts. {colours}"
                ),
                &kernels(&suite.kernels),
            ),
        );
    }
    if !suite.notes.is_empty() {
        let notes: String = suite.notes.iter().map(|note| format!("<li>{}</li>", escape(note))).collect();
        put(&mut out, format!("<h2>Notes</h2><ul>{notes}</ul>"));
    }
    put(&mut out, foot(&suite.command));
    out
}

fn tiles(suite: &Suite) -> Vec<(String, String)> {
    let c = &suite.ceilings;
    let mut tiles = vec![
        (format!("{} GB/s", figure(c.copy / 1e9)), "best copy".to_string()),
        (rate(c.product_f32), "best product, f32".into()),
        (rate(c.product_bf16), "best product, bf16".into()),
    ];
    if let Some(component) = suite.components.first()
        && let [full, composite, ..] = &component.levels[..]
    {
        tiles.push((
            format!("{} ×", figure(1.0 / composite.full_by_this)),
            format!("{}, fused against composite", component.name),
        ));
        let saved = 1.0 - full.elementwise_bytes as f64 / composite.elementwise_bytes.max(1) as f64;
        tiles.push((format!("−{}", percent(saved)), "of its elementwise bytes".into()));
    }
    tiles
}

/// Achieved rate over operations per byte, both logarithmic, under the ceilings.
fn roofline(suite: &Suite) -> String {
    const HEIGHT: f64 = 430.0;
    let (left, right, top, bottom) = (76.0, WIDTH - 24.0, 24.0, HEIGHT - 48.0);
    let shown: Vec<&KernelRow> =
        suite.kernels.iter().filter(|k| k.flops > 0 && k.bytes > 0 && k.seconds > 0.0).collect();
    let intensity = |k: &KernelRow| k.flops as f64 / k.bytes as f64;
    let achieved = |k: &KernelRow| k.flops as f64 / k.seconds;
    let extent = |values: &mut dyn Iterator<Item = f64>| {
        let (low, high) = values.fold((f64::INFINITY, 0f64), |(l, h), v| (l.min(v), h.max(v)));
        (low.log10().floor(), high.log10().ceil())
    };
    if shown.is_empty() {
        return svg(20.0, "");
    }
    let peak = suite.ceilings.product_f32.max(suite.ceilings.product_bf16);
    let (x0, x1) = extent(&mut shown.iter().map(|k| intensity(k)).chain([1.0, 1.5 * peak / suite.ceilings.copy]));
    let (y0, y1) = extent(&mut shown.iter().map(|k| achieved(k)).chain([peak]));
    let x = |v: f64| left + (right - left) * (v.log10() - x0) / (x1 - x0);
    let y = |v: f64| bottom - (bottom - top) * (v.log10() - y0) / (y1 - y0);
    let mut body = String::new();
    for decade in x0 as i32..=x1 as i32 {
        let (at, text) = (x(10f64.powi(decade)), figure(10f64.powi(decade)));
        put(
            &mut body,
            format!("<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{top}\" y2=\"{bottom}\" stroke=\"#eceff3\"/>"),
        );
        put(&mut body, label(at, bottom + 18.0, "middle", "400", GREY, &text));
    }
    for decade in y0 as i32..=y1 as i32 {
        let at = y(10f64.powi(decade));
        put(
            &mut body,
            format!("<line x1=\"{left}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#eceff3\"/>"),
        );
        put(&mut body, label(left - 8.0, at + 4.0, "end", "400", GREY, &decade_of(decade)));
    }
    put(&mut body, label(left - 8.0, top - 10.0, "end", "400", GREY, "FLOP/s"));
    put(&mut body, label(right, bottom + 38.0, "end", "400", GREY, "operations per byte"));
    let mut roofs = vec![(suite.ceilings.product_f32, "f32")];
    if suite.kernels.iter().any(|k| k.types.starts_with("bf16")) {
        roofs.push((suite.ceilings.product_bf16, "bf16"));
    }
    let mut names = String::new();
    for (i, (roof, name)) in roofs.into_iter().enumerate() {
        let ridge = roof / suite.ceilings.copy;
        let low = 10f64.powf(x0).max(10f64.powf(y0) / suite.ceilings.copy);
        put(
            &mut body,
            format!(
                "<polyline fill=\"none\" stroke=\"#1c2430\" stroke-width=\"1.6\" points=\"{:.1},{:.1} {:.1},{:.1} {right},{:.1}\"/>",
                x(low),
                y(low * suite.ceilings.copy),
                x(ridge),
                y(roof),
                y(roof)
            ),
        );
        // Above the line, or below it if that is taken; where the line begins, because kernels crowd at its end.
        let at = y(roof) + if i == 0 { -7.0 } else { 17.0 };
        put(&mut names, label(x(ridge), at, "start", "600", INK, &format!("{name}: {}/s", operations(roof))));
    }
    let slope = format!("copy: {} GB/s", figure(suite.ceilings.copy / 1e9));
    let low = 10f64.powf(x0).max(10f64.powf(y0) / suite.ceilings.copy);
    put(&mut names, label(x(low) + 8.0, y(low * suite.ceilings.copy) - 22.0, "start", "600", INK, &slope));
    let time = |k: &KernelRow| k.seconds * k.calls as f64;
    let most = shown.iter().map(|k| time(k)).fold(0.0, f64::max);
    let mut sorted = shown;
    sorted.sort_by(|a, b| time(b).total_cmp(&time(a)));
    for k in sorted {
        let radius = 3.0 + 22.0 * (time(k) / most).sqrt();
        put(
            &mut body,
            format!(
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"{radius:.1}\" fill=\"{}\" fill-opacity=\"0.55\" stroke=\"#fff\">\
                 <title>{} {}: {} ms, {} of the ceiling</title></circle>",
                x(intensity(k)),
                y(achieved(k)),
                colour(k),
                escape(&k.kernel),
                escape(&k.types),
                figure(k.seconds * 1e3),
                percent(k.share)
            ),
        );
    }
    // On top of the circles, with a rim that keeps them apart.
    put(&mut body, format!("<g stroke=\"#fff\" stroke-width=\"4\" paint-order=\"stroke\">{names}</g>"));
    svg(HEIGHT, &body)
}

/// A bar of the ceiling's share for each kernel.
fn kernels(kernels: &[KernelRow]) -> String {
    const ROW: f64 = 23.0;
    let room = WIDTH - LABEL - 340.0;
    let mut sorted: Vec<&KernelRow> = kernels.iter().collect();
    let time = |k: &KernelRow| k.seconds * k.calls as f64;
    sorted.sort_by(|a, b| time(b).total_cmp(&time(a)));
    sorted.truncate(MOST_BARS);
    let bottom = 24.0 + ROW * sorted.len() as f64;
    let mut body = String::new();
    put(&mut body, quarters(LABEL, room, bottom));
    for (i, k) in sorted.iter().enumerate() {
        let y = 24.0 + ROW * i as f64;
        put(&mut body, label(LABEL - 10.0, y + 13.0, "end", "400", INK, &shortened(&name_of(k), 58)));
        put(&mut body, bar(LABEL, y, room * k.share.clamp(0.0, 1.15), ROW - 7.0, colour(k)));
        let mut text = format!("{}  {} ms", percent(k.share), figure(k.seconds * 1e3));
        if let Some(apart) = &k.apart {
            let _ = write!(text, ", fused {} ×", figure(apart.seconds / k.seconds));
        }
        if let Some(other) = &k.other {
            let _ = write!(text, ", {} {} ms", other.name, figure(other.seconds * 1e3));
        }
        put(
            &mut body,
            label(LABEL + room * k.share.clamp(0.0, 1.15) + 8.0, y + 13.0, "start", "400", "#3b4452", &text),
        );
    }
    svg(bottom + 8.0, &body)
}

/// What a kernel is called in a picture: its name, where it stands, and what it makes.
fn name_of(k: &KernelRow) -> String {
    let made = k.types.rsplit("→ ").next().unwrap_or_default();
    format!("{} {}  {made}", k.kernel, place_of(&k.example))
}

/// The end of a name path, with a word and its number: `res_blocks.0`, `res_blocks.0.conv1`.
fn place_of(path: &str) -> &str {
    let is_number = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
    let mut starts = path.rmatch_indices('.').map(|(i, _)| i + 1).chain([0]);
    let is_enough = |&start: &usize| {
        let mut parts = path[start..].split('.');
        parts.next().is_some_and(|first| !is_number(first)) && parts.next().is_some()
    };
    starts.find(is_enough).map_or(path, |start| &path[start..])
}

fn colour(k: &KernelRow) -> &'static str {
    if k.is_arithmetic { ARITHMETIC } else { MEMORY }
}

fn rate(flops: f64) -> String {
    format!("{}/s", operations(flops))
}

/// A power of ten as an axis names it: `100 G`.
fn decade_of(decade: i32) -> String {
    let (unit, letter) = match decade {
        12.. => (12, "T"),
        9.. => (9, "G"),
        _ => (6, "M"),
    };
    format!("{} {letter}", 10f64.powi(decade - unit))
}

fn put(out: &mut String, text: String) {
    out.push_str(&text);
}

#[cfg(test)]
mod tests {
    use ltxc::bench::ceilings::Ceilings;
    use ltxc::bench::drawing::outside;
    use ltxc::bench::levels::{ByLevel, Level, Other};

    use super::*;
    use crate::kernels::Apart;
    use crate::machine::Machine;

    fn level(name: &str, seconds: f64, elementwise_bytes: u64) -> Level {
        Level {
            level: name.into(),
            calls: 68,
            flops: 1 << 40,
            bytes: 1 << 30,
            elementwise_bytes,
            arena_bytes: 1 << 20,
            seconds,
            least_seconds: None,
            full_by_this: 1210.0 / 1259.0,
            gain: None,
            predicted_gain: 0.0,
            first_seconds: seconds,
            share: 0.9,
            difference: 0.0,
        }
    }

    fn kernel(name: &str, example: &str, seconds: f64, share: f64) -> KernelRow {
        KernelRow {
            component: "transformer block".into(),
            example: example.into(),
            kernel: name.into(),
            types: "f32[1,6144,4096] bf16[16384,4096] bf16[16384] → f32[1,6144,16384]".into(),
            calls: 2,
            flops: 1 << 36,
            bytes: 1 << 28,
            seconds,
            share,
            is_arithmetic: name != "adaln",
            apart: Some(Apart { kernels: 3, bytes: 1 << 29, seconds, predicted_gain: 0.1, difference: Some(0.0) }),
            other: Some(Other { name: "PyTorch".into(), seconds }),
        }
    }

    fn suite() -> Suite {
        let others = vec![Other { name: "PyTorch, torch.compile".into(), seconds: 1.3 }];
        let levels = vec![
            level("full", 1.21, 99_100_000),
            level("composite", 1.259, 669_000_000),
            level("none", 1.347, 2_568_000_000),
        ];
        let block = ByLevel {
            name: "transformer block".into(),
            sizes: "32640 video tokens of 4096, 126 audio tokens of 2048, 1024 text tokens".into(),
            levels,
            missing: Vec::new(),
            others,
        };
        Suite {
            date: "2026-01-01".into(),
            machine: Machine { cpu: "a <processor> & more".into(), cores: 2, memory_mib: 1024, system: "linux".into() },
            device: ["cpu".into(), "2 threads".into()],
            command: "ltxc-bench suite".into(),
            what: "ltx-2-19b".into(),
            ceilings: Ceilings { copy: 41.3e9, product_f32: 200e9, product_bf16: 198e9 },
            references: Vec::new(),
            components: vec![block],
            kernels: vec![
                kernel("gemm", "blocks.0.ff.net.0", 0.345, 1.2),
                kernel("adaln", "blocks.0.audio_to_video_attn.norm_of_all_tokens.0", 0.0123, 0.43),
            ],
            notes: vec!["one & only".into()],
        }
    }

    #[test]
    fn kernels_are_named_by_the_end_of_their_path() {
        assert_eq!(place_of("vae.decoder.up_blocks.6.res_blocks.0"), "res_blocks.0");
        assert_eq!(place_of("upsampler.res_blocks.0.conv1"), "res_blocks.0.conv1");
        assert_eq!(place_of("prep.video.context"), "video.context");
        assert_eq!((place_of("features"), place_of("")), ("features", ""));
    }

    #[test]
    fn words_stay_inside_pictures() {
        let page = html(&suite());
        assert!(page.matches("<text ").count() > 30, "{page}");
        assert_eq!(outside(&page), [""; 0]);
    }

    #[test]
    fn everything_is_on_the_page() {
        let page = html(&suite());
        for word in [
            "a &lt;processor&gt; &amp; more",
            "one &amp; only",
            "1210 ms",
            "1259 ms, 1.04 × full",
            "669 MB",
            "2568 MB",
            "1300 ms, PyTorch, torch.compile",
            "copy: 41.3 GB/s",
            "f32: 200 GFLOP/s",
            "gemm net.0",
            "fused 1.00 ×",
        ] {
            assert!(page.contains(word), "`{word}` is not in:\n{page}");
        }
        let tags =
            |name: &str| (page.matches(&format!("<{name}")).count(), page.matches(&format!("</{name}>")).count());
        for name in ["svg", "text", "section", "div", "circle"] {
            let (begun, ended) = tags(name);
            assert_eq!(begun, ended, "{name}");
        }
    }

    #[test]
    fn numbers_are_read_back() {
        let text = serde_json::to_string(&suite()).unwrap();
        let read: Suite = serde_json::from_str(&text).unwrap();
        assert_eq!(html(&read), html(&suite()));
    }
}
