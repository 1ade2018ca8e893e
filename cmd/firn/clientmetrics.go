package main

import (
	"context"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"firn.io/firn/cluster"
	"firn.io/firn/cluster/meta"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
)

var (
	clientRequests = describe("client_requests_total", "Requests of the gateway to nodes, retries included.", "kind")
	clientRetries  = describe("client_retries_total", "Requests that were not the first attempt.", "kind")
	clientTrouble  = describe("client_trouble_total", "What made the gateway try again, or give up.", "why")
	etcdAnswers    = describe("etcd_up", "1: a member of etcd answered when it was last asked.")
	etcdBytes      = describe("etcd_database_bytes", "Size of the fullest member's database.")
	etcdQuota      = describe("etcd_quota_bytes", "What that may grow to; 0: it does not say.")
	etcdAlarms     = describe("etcd_alarms", "Alarms that members of etcd have raised.")
	etcdAlarm      = describe("etcd_alarm", "1: operators should look after etcd (60 % of the quota, or an alarm).")
)

// clientMetrics are those of a cluster.Client, which is asked on its loop.
func clientMetrics(l *loop.System, client *cluster.Client) collector {
	return func(emit func(*prometheus.Desc, prometheus.ValueType, float64, ...string)) {
		var c cluster.Counters
		if !l.Call(func() { c = client.Counters() }) {
			return
		}
		emit(clientRequests, prometheus.CounterValue, float64(c.Commands), "command")
		emit(clientRequests, prometheus.CounterValue, float64(c.Queries), "query")
		emit(clientRetries, prometheus.CounterValue, float64(c.CommandRetries), "command")
		emit(clientRetries, prometheus.CounterValue, float64(c.QueryRetries), "query")
		for _, t := range []struct {
			why string
			n   uint64
		}{
			{"lost", c.Lost}, {"redirect", c.Redirects}, {"not_ready", c.NotReady}, {"busy", c.Busy}, {"dropped", c.Dropped},
			{"stale_layout", c.StaleLayouts}, {"fenced", c.Fenced}, {"no_space", c.NoSpace}, {"bad_read", c.BadReads},
			{"corrupt", c.Corrupt}, {"stray", c.Stray},
		} {
			emit(clientTrouble, prometheus.CounterValue, float64(t.n), t.why)
		}
	}
}

const (
	// etcdUsageEvery bounds how often etcd is asked how full it is.
	etcdUsageEvery = 30 * time.Second
	// etcdUsageTime bounds how long a scrape waits for its answer.
	etcdUsageTime = time.Second
)

// usageStore is a metadata store that tells how full it is.
type usageStore interface {
	Usage(context.Context) (meta.Usage, error)
}

// etcdMetrics tell how full etcd is. Scrapes share an answer for a while, and
// so they do a silence.
func etcdMetrics(store usageStore, clk clock.Clock) collector {
	var (
		mu    sync.Mutex
		asked bool
		at    clock.Instant
		u     meta.Usage
		err   error
	)
	return func(emit func(*prometheus.Desc, prometheus.ValueType, float64, ...string)) {
		mu.Lock()
		defer mu.Unlock()
		if now := clk.Now(); !asked || now.Sub(at) >= etcdUsageEvery {
			ctx, cancel := context.WithTimeout(context.Background(), etcdUsageTime)
			u, err = store.Usage(ctx)
			cancel()
			asked, at = true, now
		}
		if err != nil {
			emit(etcdAnswers, prometheus.GaugeValue, 0)
			return
		}
		emit(etcdAnswers, prometheus.GaugeValue, 1)
		emit(etcdBytes, prometheus.GaugeValue, float64(u.Bytes))
		emit(etcdQuota, prometheus.GaugeValue, float64(u.QuotaBytes))
		emit(etcdAlarms, prometheus.GaugeValue, float64(len(u.Alarms)))
		alarm := 0.0
		if u.Alarm() {
			alarm = 1
		}
		emit(etcdAlarm, prometheus.GaugeValue, alarm)
	}
}
