package main

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"firn.io/firn/internal/block"
)

// latencyBuckets are in seconds: from what memory takes to what a stall does.
var latencyBuckets = []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}

// latencies are how long volumes take for the requests of one protocol, from the
// frontend's call to the answer, with what ended in an error.
type latencies struct {
	read, write, flush, trim, zero prometheus.Observer
}

// requestTimes makes the histograms of all protocols.
func requestTimes() *prometheus.HistogramVec {
	return prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "firn_request_seconds", Help: "Time that a volume took for a request of a frontend (of at most 1 MiB: larger ones are several).",
		Buckets: latencyBuckets,
	}, []string{"protocol", "operation"})
}

func latenciesOf(times *prometheus.HistogramVec, protocol string) *latencies {
	of := func(operation string) prometheus.Observer { return times.WithLabelValues(protocol, operation) }
	return &latencies{read: of("read"), write: of("write"), flush: of("flush"), trim: of("trim"), zero: of("write_zeroes")}
}

// timed is a device whose requests are timed. It forwards ResizeNotifier alone of
// the optional interfaces: volumes have no other.
type timed struct {
	block.Device
	times *latencies
}

func since(o prometheus.Observer, begin time.Time) { o.Observe(time.Since(begin).Seconds()) }

// ReadAt implements block.Device.
func (t timed) ReadAt(ctx context.Context, p []byte, off int64) error {
	begin := time.Now()
	err := t.Device.ReadAt(ctx, p, off)
	since(t.times.read, begin)
	return err
}

// WriteAt implements block.Device.
func (t timed) WriteAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	begin := time.Now()
	err := t.Device.WriteAt(ctx, p, off, f)
	since(t.times.write, begin)
	return err
}

// Flush implements block.Device.
func (t timed) Flush(ctx context.Context) error {
	begin := time.Now()
	err := t.Device.Flush(ctx)
	since(t.times.flush, begin)
	return err
}

// Trim implements block.Device.
func (t timed) Trim(ctx context.Context, off, n int64, f block.Flags) error {
	begin := time.Now()
	err := t.Device.Trim(ctx, off, n, f)
	since(t.times.trim, begin)
	return err
}

// WriteZeroes implements block.Device.
func (t timed) WriteZeroes(ctx context.Context, off, n int64, f block.Flags) error {
	begin := time.Now()
	err := t.Device.WriteZeroes(ctx, off, n, f)
	since(t.times.zero, begin)
	return err
}

// NotifyResize implements block.ResizeNotifier.
func (t timed) NotifyResize(f func(block.Geometry)) (stop func()) {
	if n, ok := t.Device.(block.ResizeNotifier); ok {
		return n.NotifyResize(f)
	}
	return func() {}
}
