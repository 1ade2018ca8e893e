package main

import (
	"context"

	"github.com/prometheus/client_golang/prometheus"

	"firn.io/firn/internal/block"
	"firn.io/firn/nbd/attach"
)

var (
	attachLive       = describe("attach_connections", "Connections of the device that live.", "volume", "device")
	attachWanted     = describe("attach_connections_wanted", "Connections that the device should have.", "volume", "device")
	attachReconnects = describe("attach_reconnects_total", "Connections that took the place of lost ones.", "volume", "device")
	attachMoves      = describe("attach_moves_total", "Times that this was at another gateway.", "volume", "device")
	attachDown       = describe("attach_down_seconds_total", "Time without any connection.", "volume", "device")
	attachLongest    = describe("attach_longest_down_seconds", "The longest time without any connection.", "volume", "device")
	attachSize       = describe("attach_size_bytes", "Size of the device.", "volume", "device")
)

func attachMetrics(d *attach.Device) collector {
	return func(emit func(*prometheus.Desc, prometheus.ValueType, float64, ...string)) {
		s, path := d.Status(), d.Path()
		emit(attachLive, prometheus.GaugeValue, float64(s.Live), s.Export, path)
		emit(attachWanted, prometheus.GaugeValue, float64(s.Connections), s.Export, path)
		emit(attachReconnects, prometheus.CounterValue, float64(s.Reconnects), s.Export, path)
		emit(attachMoves, prometheus.CounterValue, float64(s.Moves), s.Export, path)
		emit(attachDown, prometheus.CounterValue, float64(s.DownMillis)/1000, s.Export, path)
		emit(attachLongest, prometheus.GaugeValue, float64(s.LongestMillis)/1000, s.Export, path)
		emit(attachSize, prometheus.GaugeValue, float64(s.Bytes), s.Export, path)
	}
}

// serveHTTP serves the pages of --http, if that is given.
func (a *attachment) serveHTTP(d *attach.Device) (stop func(), err error) {
	if a.flags.http == "" {
		return func() {}, nil
	}
	l, err := listen("--http", a.flags.http)
	if err != nil {
		return nil, err
	}
	o := &observed{metrics: newMetrics(), ready: func(context.Context) error {
		if s := d.Status(); s.Live == 0 {
			return block.Errorf(block.Unavailable, "the device has no connection: %s", s.Problem)
		}
		return nil
	}}
	o.metrics.MustRegister(attachMetrics(d))
	return o.serveHTTP(l), nil
}
