package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/node"
	"firn.io/firn/cluster/transport"
	"firn.io/firn/cluster/transport/grpc"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
)

const (
	defaultListen   = "127.0.0.1:7410"
	defaultNodeHTTP = "127.0.0.1:7490"
)

// parseDisk reads DIR or DIR=SIZE.
func parseDisk(text string) (node.DiskConfig, error) {
	dir, capacity, sized := strings.Cut(text, "=")
	d := node.DiskConfig{Dir: dir}
	if dir == "" {
		return d, block.Errorf(block.Invalid, "--disk %q: write it as DIR or DIR=SIZE", text)
	}
	if sized {
		n, err := parseSize(capacity)
		if err != nil {
			return d, block.Wrap(block.Invalid, err, "--disk %s", text)
		}
		d.CapacityBytes = n
	}
	return d, nil
}

func newNode(c *console, r *remote) *cobra.Command {
	var id uint32
	var disks []string
	var etcd etcdFlags
	var listenAddr, advertise, http, zone, logLevel string
	var tls tlsFlags
	var replaceAfter time.Duration
	cmd := &cobra.Command{
		Use: "node --id ID --disk DIR[=SIZE]... --etcd URLS", Short: "Store replicas; `node ls` lists the nodes", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := startLog(c, logLevel); err != nil {
				return err
			}
			if err := required(cmd, "id", "disk", "etcd"); err != nil {
				return err
			}
			if id == 0 || id > meta.MaxNodeID {
				return block.Errorf(block.Invalid, "--id %d: use 1 to %d", id, meta.MaxNodeID)
			}
			if err := errors.Join(checkAddress("--listen", listenAddr), checkAddress("--http", http), etcd.check()); err != nil {
				return err
			}
			if err := tls.guard("--listen", listenAddr); err != nil {
				return err
			}
			if err := checkReplaceAfter(replaceAfter); err != nil {
				return err
			}
			config, err := tls.config()
			if err != nil {
				return err
			}
			var configs []node.DiskConfig
			for _, text := range disks {
				d, err := parseDisk(text)
				if err != nil {
					return err
				}
				configs = append(configs, d)
			}
			return serveUntil(cmd.Context(), func(ctx context.Context, parts *stack, failed func(error)) error {
				web, page, err := openHTTP(http, parts)
				if err != nil {
					return err
				}
				store, clusterID, err := etcd.open(ctx, c, page, parts)
				if err != nil {
					return err
				}
				network := func(l loop.Loop, id transport.Identity, _ string) transport.Network {
					return grpc.New(grpc.Options{Loop: l, Identity: id, ClientTLS: config, ServerTLS: config})
				}
				cfg := storageConfig{
					id: block.NodeID(id), cluster: clusterID, listen: listenAddr, advertise: advertise, zone: zone, disks: configs,
					store: store, replaceAfter: replaceAfter, network: network, metrics: page.metrics,
				}
				s, err := openStorage(ctx, cfg, parts)
				if err != nil {
					return err
				}
				if err := s.start(ctx, cfg, parts); err != nil {
					return err
				}
				v := readyView{Ready: true, Cluster: clusterID.String(), Listen: s.node.Addr()}
				if web != nil {
					v.HTTP = web.Addr().String()
				}
				page.set(s.ready, nil)
				parts.push("readiness", func(context.Context) error { page.waitsFor("it is stopping"); return nil })
				starting, cancel := context.WithTimeout(ctx, startTime)
				defer cancel()
				if err := c.waiting(starting, "starting", s.awaitStarted); err != nil {
					return err
				}
				return c.print(v, func(w io.Writer) {
					fmt.Fprintf(w, "node %d serves on %s\nready; Ctrl-C stops\n", id, v.Listen)
				})
			})
		},
	}
	f := cmd.Flags()
	f.Uint32Var(&id, "id", 0, "number of this node, unique in the cluster and always the same")
	f.StringArrayVar(&disks, "disk", nil, "folder on a disk of its own, and how much of it to fill (default all); may be repeated")
	etcd.register(f)
	f.StringVar(&listenAddr, "listen", defaultListen, "serve nodes and gateways here")
	f.StringVar(&advertise, "advertise", "", "address that others reach --listen at, if it differs")
	f.StringVar(&http, "http", defaultNodeHTTP, "serve /healthz, /readyz and /metrics here; empty: nowhere")
	f.StringVar(&zone, "zone", "", "failure zone: replicas are spread over zones")
	f.DurationVar(&replaceAfter, "replace-after", 0, replaceAfterUsage)
	tls.registerOn(f)
	logFlag(cmd, &logLevel, "info")
	ls := nodeLs(r)
	r.flags(ls)
	cmd.AddCommand(ls)
	return cmd
}
