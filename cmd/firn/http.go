package main

import (
	"context"
	"errors"
	"html/template"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"

	"firn.io/firn/cluster/clusterpb"
	"firn.io/firn/internal/block"
)

// What a probe of readiness and the status page wait for. Orchestrators give a
// probe a second by default.
const (
	probeTimeout = 700 * time.Millisecond
	pageTimeout  = 3 * time.Second
)

// observed is a role as its HTTP pages see it, from before it is ready until
// after it has stopped.
type observed struct {
	metrics *prometheus.Registry

	mu sync.Mutex
	// ready returns why the role cannot do its work now, or nil.
	ready func(context.Context) error
	// status is nil for roles without a status page.
	status func(context.Context) (*clusterpb.StatusResponse, error)
}

func (o *observed) set(ready func(context.Context) error, status func(context.Context) (*clusterpb.StatusResponse, error)) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ready, o.status = ready, status
}

// waitsFor says why the role is not ready.
func (o *observed) waitsFor(format string, args ...any) {
	err := block.Errorf(block.Unavailable, format, args...)
	o.set(func(context.Context) error { return err }, nil)
}

func (o *observed) now() (ready func(context.Context) error, status func(context.Context) (*clusterpb.StatusResponse, error)) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.ready, o.status
}

// openHTTP serves the pages of a role that is just starting on addr, unless that
// is empty, and pushes their end on parts.
func openHTTP(addr string, parts *stack) (net.Listener, *observed, error) {
	o := &observed{metrics: newMetrics()}
	o.waitsFor("it is still starting")
	if addr == "" {
		return nil, o, nil
	}
	l, err := listen("--http", addr)
	if err != nil {
		return nil, nil, err
	}
	stop := o.serveHTTP(l)
	parts.push("HTTP", func(context.Context) error { stop(); return nil })
	return l, o, nil
}

func newMetrics() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// handler serves /healthz (the process lives), /readyz (it can do its work),
// /metrics, and a page for people.
func (o *observed) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) { w.Write([]byte("ok\n")) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), probeTimeout)
		defer cancel()
		ready, _ := o.now()
		if err := ready(ctx); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		w.Write([]byte("ok\n"))
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(o.metrics, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /{$}", o.page)
	return mux
}

var pageTemplate = template.Must(template.New("status").Funcs(template.FuncMap{"size": formatSize, "onoff": onOff}).Parse(`<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="5"><title>Firn</title>
<style>body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#1b2733}
table{border-collapse:collapse;width:100%;margin:.5rem 0 1.5rem}th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid #d8e0e6}
th{font-weight:600;color:#5a6b78}.ok{color:#157347}.bad{color:#b02a37}small{color:#5a6b78}</style></head><body>
<h1>Firn</h1><p><small>cluster {{.ClusterId}}, {{.Version}}, gateway {{.Gateway}}, NBD on {{.NbdAddr}}, {{if .Partial}}etcd does not answer: nodes, groups and other gateways are not known{{else}}{{.Groups}} groups, {{.DegradedGroups}} degraded, {{.StuckGroups}} without a majority{{end}}</small></p>
{{if .Problems}}<ul>{{range .Problems}}<li class="bad">{{.What}}{{with .Remedy}}<br><small>{{.}}</small>{{end}}</li>{{end}}</ul>{{else}}<p class="ok">healthy</p>{{end}}
<h2>Volumes</h2><table><tr><th>name<th>size<th>replicas<th>attached to<th>clients here<th>read-only<th>state</tr>
{{range .Volumes}}<tr><td>{{.Name}}<td>{{size .SizeBytes}}<td>{{if .Replicas}}{{.Replicas}}{{else}}-{{end}}<td>{{.AttachedTo}}<td>{{.Clients}}<td>{{onoff .ReadOnly}}<td>{{.State}}</tr>{{end}}</table>
{{if not .Partial}}<h2>Nodes</h2><table><tr><th>node<th>address<th>zone<th>state<th>disks</tr>
{{range .Nodes}}<tr><td>{{.Id}}<td>{{.Addr}}<td>{{.Zone}}<td>{{if .Alive}}<span class="ok">up</span>{{else}}<span class="bad">down</span>{{end}}<td>{{range .Disks}}{{size .CapacityBytes}}{{if .Failed}} <span class="bad">failed</span>{{end}} {{end}}</tr>{{end}}</table>{{end}}
</body></html>
`))

func (o *observed) page(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), pageTimeout)
	defer cancel()
	ready, status := o.now()
	var s *clusterpb.StatusResponse
	err := ready(ctx)
	if status != nil {
		s, err = status(ctx)
	}
	if err != nil {
		http.Error(w, "not ready: "+err.Error(), http.StatusServiceUnavailable)
		return
	}
	if s == nil {
		w.Write([]byte("ready; see /metrics\n"))
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	if err := pageTemplate.Execute(w, s); err != nil {
		slog.Debug("status page", "err", err)
	}
}

// listen opens addr for the flag that named it; a taken port is an error of
// kind busy that says what to do.
func listen(flag, addr string) (net.Listener, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, addressError(flag, addr, err)
	}
	return l, nil
}

// serveHTTP serves o on l until stop is called.
func (o *observed) serveHTTP(l net.Listener) (stop func()) {
	server := &http.Server{Handler: o.handler(), ReadHeaderTimeout: 10 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			slog.Error("HTTP server stopped", "err", err)
		}
	}()
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if server.Shutdown(ctx) != nil {
			server.Close()
		}
		<-done
	}
}

// addressError explains why flag's address cannot be listened on.
func addressError(flag, addr string, err error) error {
	if errors.Is(err, unix.EADDRINUSE) {
		return block.Errorf(block.Busy, "%s %s: another process listens there; choose another address with %s, or stop that process", flag, addr, flag)
	}
	return block.Wrap(block.Invalid, err, "%s %s", flag, addr)
}
