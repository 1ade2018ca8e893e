package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"google.golang.org/grpc/credentials"

	"firn.io/firn/cluster"
	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/transport"
	"firn.io/firn/cluster/transport/grpc"
	"firn.io/firn/gateway"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/vfs"
	"firn.io/firn/nbd"
)

const (
	defaultNBD  = "127.0.0.1:10809"
	defaultHTTP = "127.0.0.1:7480"
)

// frontFlags are the addresses that a gateway serves on.
type frontFlags struct {
	nbd, api, http          string
	advertise, advertiseNBD string
	tls                     tlsFlags
	nbdTLS                  nbdTLSFlags
	iscsi                   iscsiFlags
}

func (f *frontFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.nbd, "nbd", defaultNBD, "serve NBD here: HOST:PORT or unix:PATH")
	cmd.Flags().StringVar(&f.api, "api", defaultAPI, "serve the admin API here")
	cmd.Flags().StringVar(&f.advertise, "advertise", "", "HOST:PORT that other gateways reach --api at, if it differs")
	cmd.Flags().StringVar(&f.advertiseNBD, "advertise-nbd", "", "HOST:PORT that clients reach --nbd at, if it differs")
	cmd.Flags().StringVar(&f.http, "http", defaultHTTP, "serve /healthz, /readyz, /metrics and the status page here; empty: nowhere")
	f.tls.register(cmd)
	f.nbdTLS.register(cmd.Flags())
	f.iscsi.register(cmd)
}

// fronts are listeners that do not serve yet: opened first, so that a taken
// port is known before anything else is done.
type fronts struct {
	nbd, api, http net.Listener // http may be nil
	creds          credentials.TransportCredentials
	access         nbdAccess
	// apiAddr and nbdAddr are where others reach api and nbd.
	apiAddr, nbdAddr string
	page             *observed
	iscsi            iscsiFront
	flags            frontFlags
}

func (f *frontFlags) listen(ctx context.Context, parts *stack) (*fronts, error) {
	creds, err := f.tls.server("--api", f.api)
	if err != nil {
		return nil, err
	}
	out := &fronts{creds: creds, flags: *f}
	if out.access, err = f.nbdTLS.access(); err != nil {
		return nil, err
	}
	if out.nbd, err = nbd.Listen(ctx, f.nbd); err != nil {
		return nil, addressError("--nbd", f.nbd, err)
	}
	parts.push("NBD listener", closing(out.nbd))
	if out.api, err = listen("--api", f.api); err != nil {
		return nil, err
	}
	parts.push("API listener", closing(out.api))
	out.apiAddr, out.nbdAddr = cmp.Or(f.advertise, out.api.Addr().String()), cmp.Or(f.advertiseNBD, spelled(out.nbd.Addr()))
	if out.iscsi, err = f.iscsi.listen(ctx, parts); err != nil {
		return nil, err
	}
	out.http, out.page, err = openHTTP(f.http, parts)
	return out, err
}

// closing closes a listener that its server may have closed already.
func closing(l net.Listener) func(context.Context) error {
	return func(context.Context) error {
		if err := l.Close(); !errors.Is(err, net.ErrClosed) {
			return err
		}
		return nil
	}
}

// served is a gateway with its frontends.
type served struct {
	session uint64
	id      string
	cluster block.ClusterID
	nbdAddr string
	store   meta.Store
	loop    *loop.System
	catalog *catalog
	gateway *gateway.Gateway
	nbd     *nbd.Server
	targets *volumeTargets // nil without iSCSI
	times   *prometheus.HistogramVec
	yielded yielded
	// creds are for the API, in both directions.
	creds credentials.TransportCredentials
}

// gatewayConfig is what a gateway is started with.
type gatewayConfig struct {
	id      string
	cluster block.ClusterID
	// folder identifies the locked data folder: with the boot id it proves that
	// an older process of this gateway is gone (F3).
	folder  string
	store   meta.Store
	network func(l loop.Loop, id transport.Identity, name string) transport.Network
	fronts  *fronts
	metrics *prometheus.Registry
	// ready is what must hold besides, for /readyz.
	ready func(context.Context) error
}

// openGateway starts a gateway and its frontends and pushes their stops on parts.
func openGateway(ctx context.Context, cfg gatewayConfig, parts *stack, failed func(error)) (*served, error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	s := &served{id: cfg.id, cluster: cfg.cluster, store: cfg.store, nbdAddr: cfg.fronts.nbdAddr, creds: cfg.fronts.creds, times: requestTimes()}
	s.loop = loop.NewSystem(clock.System{}, loop.DefaultLimits)
	parts.push("gateway's loop", func(context.Context) error { s.loop.Stop(); return nil })

	session := randomNumber()
	s.session = session
	network := cfg.network(s.loop, transport.Identity{Hello: transport.Hello{Cluster: cfg.cluster, Session: session}}, "gateway")
	client := startClient(ctx, "gateway's client", cluster.Config{
		Loop: s.loop, Store: cfg.store, Network: network, Cluster: cfg.cluster, Log: slog.Default(), OwnerAddr: s.nbdAddr,
		Gateway: meta.GatewayMeta{ID: cfg.id, Incarnation: session, Addr: cfg.fronts.apiAddr, NBD: s.nbdAddr, Boot: boot, Folder: cfg.folder},
	}, parts)
	s.catalog = &catalog{loop: s.loop, store: cfg.store, client: client}
	storage := s.catalog.storage()
	storage.Attach = s.yielded.attach(storage.Attach)
	s.gateway = gateway.New(gateway.Options{Loop: s.loop, Log: slog.Default(), Storage: storage})
	parts.push("gateway", s.gateway.Close)

	access := cfg.fronts.access
	server := nbd.NewServer(access.guard(exports{s.gateway, latenciesOf(s.times, "nbd")}), nbd.Options{Log: slog.Default(), TLS: access.tls, RequireTLS: access.require})
	s.nbd = server
	serving := make(chan struct{})
	go func() {
		defer close(serving)
		if err := server.Serve(cfg.fronts.nbd); !errors.Is(err, nbd.ErrServerClosed) {
			failed(block.Wrap(block.Unavailable, err, "NBD server"))
		}
	}()
	parts.push("NBD server", func(ctx context.Context) error {
		err := stopClients(ctx, "NBD", server.Shutdown)
		<-serving
		return err
	})
	stopAPI := s.serveAPI(cfg.fronts.api, cfg.fronts.creds, failed)
	parts.push("API", func(context.Context) error { stopAPI(); return nil })
	iscsiServer := s.serveISCSI(cfg.fronts.iscsi, parts, failed)
	cfg.metrics.MustRegister(gatewayMetrics(s.gateway, server), iscsiMetrics(iscsiServer), s.times)
	cfg.metrics.MustRegister(clientMetrics(s.loop, client))
	if store, ok := cfg.store.(usageStore); ok {
		cfg.metrics.MustRegister(etcdMetrics(store, clock.System{}))
	}
	cfg.fronts.page.set(func(ctx context.Context) error {
		err := s.ready(ctx)
		if err == nil && cfg.ready != nil {
			err = cfg.ready(ctx)
		}
		return err
	}, s.status)
	parts.push("readiness", func(context.Context) error { cfg.fronts.page.waitsFor("it is stopping"); return nil })
	return s, nil
}

// ready tells why no volume can be attached here now, or nil.
func (s *served) ready(ctx context.Context) error {
	// At once, where it is known already: probes do not wait long.
	var away error
	if s.loop.Call(func() { away = s.catalog.client.StoreProblem() }); away != nil {
		return away
	}
	live, err := meta.ListLive(ctx, s.store)
	switch {
	case err != nil:
		return err
	case len(live) == 0:
		return block.Errorf(block.Unavailable, "no storage node is up")
	}
	if err := s.groupsReady(ctx, live); err != nil {
		return err
	}
	return s.registered(ctx)
}

func newGateway(c *console) *cobra.Command {
	var fronts frontFlags
	var id, data, logLevel string
	var etcd etcdFlags
	cmd := &cobra.Command{
		Use: "gateway --id ID --data DIR --etcd URLS", Short: "Serve the cluster's volumes over NBD and iSCSI", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := startLog(c, logLevel); err != nil {
				return err
			}
			if err := required(cmd, "id", "data", "etcd"); err != nil {
				return err
			}
			if err := errors.Join(meta.CheckGatewayID(id), fronts.check(), etcd.check()); err != nil {
				return err
			}
			return serveUntil(cmd.Context(), func(ctx context.Context, parts *stack, failed func(error)) error {
				lock, err := lockFolder(ctx, vfs.NewOS(), data)
				if err != nil {
					return err
				}
				parts.push("data folder", func(context.Context) error { return lock.Close() })
				folder, err := folderID(data)
				if err != nil {
					return err
				}
				listeners, err := fronts.listen(ctx, parts)
				if err != nil {
					return err
				}
				stopAnswering := listeners.answerMeanwhile(id, etcd.endpoints, nbdMeanwhile)
				store, clusterID, err := etcd.open(ctx, c, listeners.page, parts)
				stopAnswering()
				if err != nil {
					return err
				}
				tls, err := fronts.tls.config()
				if err != nil {
					return err
				}
				s, err := openGateway(ctx, gatewayConfig{
					id: id, cluster: clusterID, folder: folder, store: store, fronts: listeners, metrics: listeners.page.metrics,
					network: func(l loop.Loop, id transport.Identity, _ string) transport.Network {
						return grpc.New(grpc.Options{Loop: l, Identity: id, ClientTLS: tls, ServerTLS: tls})
					},
				}, parts, failed)
				if err != nil {
					return err
				}
				if err := c.waiting(ctx, "registering", s.awaitRegistered); err != nil {
					return err
				}
				v := listeners.view(clusterID)
				return c.print(v, func(w io.Writer) {
					listeners.write(w, v)
					fmt.Fprintln(w, "\nready; Ctrl-C stops")
				})
			})
		},
	}
	cmd.Flags().StringVar(&id, "id", "", "name of this gateway, unique in the cluster")
	cmd.Flags().StringVar(&data, "data", "", "folder of this gateway's own")
	etcd.register(cmd.Flags())
	fronts.register(cmd)
	logFlag(cmd, &logLevel, "info")
	return cmd
}

// required refuses flags that were given neither on the command line nor elsewhere.
func required(cmd *cobra.Command, names ...string) error {
	for _, name := range names {
		if !cmd.Flags().Changed(name) {
			return block.Errorf(block.Invalid, "--%s is missing; see `%s --help`", name, cmd.CommandPath())
		}
	}
	return nil
}

// awaitRegistered waits until the gateway is known under its id. Busy: another
// process is, for longer than its lease would last without it.
func (s *served) awaitRegistered(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, registerTime)
	defer cancel()
	return awaitReady(ctx, s.registered)
}

func (s *served) registered(ctx context.Context) error {
	all, err := meta.ListGateways(ctx, s.store)
	if err != nil {
		return err
	}
	for _, g := range all {
		switch {
		case g.ID != s.id:
		case g.Incarnation == s.session:
			return nil
		default:
			return block.Errorf(block.Busy, "gateway %q is running already, at %s: give this one another --id, or stop that one", s.id, g.Addr)
		}
	}
	return block.Errorf(block.Unavailable, "gateway %q is not registered: it has no lease from etcd", s.id)
}
