package main

import (
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/block/blocktest"
)

// Requests are counted by protocol and operation, without an allocation each.
func TestRequestTimes(t *testing.T) {
	times := requestTimes()
	registry := prometheus.NewRegistry()
	registry.MustRegister(times)
	d := timed{blocktest.New(blocktest.Options{Bytes: 1 << 20}), latenciesOf(times, "nbd")}
	ctx, p := t.Context(), make([]byte, 4096)
	calls := []func() error{
		func() error { return d.ReadAt(ctx, p, 0) },
		func() error { return d.WriteAt(ctx, p, 0, 0) },
		func() error { return d.Flush(ctx) },
		func() error { return d.Trim(ctx, 0, 4096, 0) },
		func() error { return d.WriteZeroes(ctx, 0, 4096, block.NoHole) },
	}
	for _, call := range calls {
		if err := call(); err != nil {
			t.Fatal(err)
		}
	}
	families, err := registry.Gather()
	if err != nil || len(families) != 1 || families[0].GetName() != "firn_request_seconds" {
		t.Fatalf("%v, %v", families, err)
	}
	var seen []string
	for _, m := range families[0].Metric {
		if m.Histogram.GetSampleCount() != 1 || m.Histogram.GetSampleSum() <= 0 {
			t.Errorf("%v", m)
		}
		seen = append(seen, m.Label[0].GetValue())
	}
	if got := strings.Join(seen, " "); got != "flush read trim write write_zeroes" {
		t.Errorf("operations %s", got)
	}
	inner := testing.AllocsPerRun(100, func() { _ = d.Device.ReadAt(ctx, p, 0) })
	if n := testing.AllocsPerRun(100, func() { _ = d.ReadAt(ctx, p, 0) }); n > inner {
		t.Errorf("%v allocations a read, %v without times", n, inner)
	}
}
