package main

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/internal/clock"
)

type heldClock struct {
	clock.System
	now clock.Instant
}

func (c *heldClock) Now() clock.Instant { return c.now }

type scriptedUsage struct {
	asked int
	usage meta.Usage
	err   error
}

func (s *scriptedUsage) Usage(context.Context) (meta.Usage, error) {
	s.asked++
	return s.usage, s.err
}

// TestEtcdMetrics: scrapes share an answer, and a silence, for etcdUsageEvery.
func TestEtcdMetrics(t *testing.T) {
	clk := &heldClock{}
	store := &scriptedUsage{err: errors.New("silent")}
	collect := etcdMetrics(store, clk)
	scrape := func() map[*prometheus.Desc]float64 {
		got := map[*prometheus.Desc]float64{}
		collect(func(d *prometheus.Desc, _ prometheus.ValueType, v float64, _ ...string) { got[d] = v })
		return got
	}
	for range 3 {
		if got := scrape(); len(got) != 1 || got[etcdAnswers] != 0 {
			t.Errorf("of a silent etcd: %v", got)
		}
	}
	if store.asked != 1 {
		t.Errorf("asked %d times", store.asked)
	}
	store.err, store.usage = nil, meta.Usage{Bytes: 700, QuotaBytes: 1000}
	clk.now = clk.now.Add(etcdUsageEvery - time.Second)
	if scrape(); store.asked != 1 {
		t.Error("asked too soon")
	}
	clk.now = clk.now.Add(time.Second)
	got := scrape()
	if got[etcdAnswers] != 1 || got[etcdBytes] != 700 || got[etcdQuota] != 1000 || got[etcdAlarms] != 0 || got[etcdAlarm] != 1 {
		t.Errorf("%v", got)
	}
}
