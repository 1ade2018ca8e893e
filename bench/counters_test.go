package main

import (
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
)

const someCounters = `# HELP firn_disk_syncs_total Syncs.
firn_disk_log_written_bytes_total{disk="a",node="1",what="batch"} 1000
firn_disk_log_written_bytes_total{disk="b",node="2",what="batch"} 24
firn_disk_log_written_bytes_total{disk="a",node="1",what="moved"} 0
firn_disk_log_written_bytes_total{disk="a",node="1",what="zeroed"} 1e+06
firn_disk_pending_updates{disk="a",node="1"} 7
firn_disk_written_bytes_total{class="index",node="1"} 5
firn_disk_written_bytes_total{class="log",node="1"} 500
firn_disk_syncs_total{class="log",node="1"} 3
firn_disk_syncs_total{class="index",node="1"} 4
go_memstats_mallocs_total 9
`

// TestFailedScrapeIsAnError: what could not be read is not zero.
func TestFailedScrapeIsAnError(t *testing.T) {
	var text string
	status := http.StatusOK
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		w.Write([]byte(text))
	}))
	defer web.Close()
	r := &running{metrics: web.URL}
	text = someCounters
	c, err := r.counters(t.Context())
	if want := (counters{true, 1024, 0, 1e6, 5, 7, 9, 7}); err != nil || c != want {
		t.Errorf("%+v, %v; want %+v", c, err, want)
	}
	for _, line := range []string{"moved", "pending", "index", "syncs", "mallocs"} {
		text = ""
		for l := range strings.Lines(someCounters) {
			if !strings.Contains(l, line) {
				text += l
			}
		}
		if _, err := r.counters(t.Context()); err == nil {
			t.Errorf("without %s: no error", line)
		}
	}
	text, status = someCounters, http.StatusServiceUnavailable
	if _, err := r.counters(t.Context()); err == nil {
		t.Error("of an answer that is an error: none")
	}
	web.Close()
	if _, err := r.settled(t.Context()); err == nil {
		t.Error("of a server that is gone: no error")
	}
	if c, err := (&running{}).settled(t.Context()); err != nil || c.measured {
		t.Errorf("of a server without counters: %+v, %v", c, err)
	}
	if _, err := processTime(os.Getpid()); err != nil {
		t.Error(err)
	}
	if _, err := processTime(1 << 30); err == nil {
		t.Error("of a process that is gone: no error")
	}
}

// TestCells: a dash is what was not measured, a zero what was.
func TestCells(t *testing.T) {
	write := row{server: "s", job: job{rw: "randwrite"}, fio: fioResult{ops: 10, bytes: 40960}, device: counters{measured: true, batches: 81920, syncs: 5}}
	if got := write.cells(); strings.Contains(got, "| - |") || !strings.Contains(got, "| 2.00 | 0.00 | 0.00 | 0.00 | 0.50 |") {
		t.Errorf("%s", got)
	}
	write.device = counters{}
	if got := write.cells(); strings.Count(got, "| - ") != 6 || strings.Contains(got, "0.00") {
		t.Errorf("%s", got)
	}
	read := row{server: "s", job: job{rw: "randread"}, fio: fioResult{ops: 10, bytes: 40960}, device: counters{measured: true}}
	if got := read.cells(); strings.Count(got, "| - ") != 4 || strings.Count(got, "| 0.00 ") != 2 {
		t.Errorf("%s", got)
	}
}
