package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/pflag"

	"firn.io/firn/internal/block"
	"firn.io/firn/nbd"
)

// nbdTLSFlags say who may use NBD. Their authority is not that of gRPC: a
// client of volumes must not become a node.
type nbdTLSFlags struct {
	mode, cert, key, ca string
	allow               []string
}

func (f *nbdTLSFlags) register(flags *pflag.FlagSet) {
	flags.StringVar(&f.mode, "nbd-tls", "", "TLS of NBD clients: off, on (clients may) or require; require where --nbd-tls-cert is given")
	flags.StringVar(&f.cert, "nbd-tls-cert", "", "PEM certificate shown to NBD clients; read again when the file changes")
	flags.StringVar(&f.key, "nbd-tls-key", "", "PEM key of --nbd-tls-cert")
	flags.StringVar(&f.ca, "nbd-tls-ca", "", "PEM certificates that NBD clients' certificates must be signed by; empty: clients need none")
	flags.StringArrayVar(&f.allow, "nbd-allow", nil, "VOLUME=NAME: only clients whose certificate has NAME enter VOLUME (* for every volume); repeatable, and then every volume that is not named is closed")
}

// nbdAccess is who may use NBD, and how.
type nbdAccess struct {
	tls     *tls.Config
	require bool
	// allow maps volumes to the names of clients; nil lets everybody in.
	allow map[string][]string
}

func (f *nbdTLSFlags) access() (a nbdAccess, err error) {
	mode := f.mode
	if mode == "" {
		mode = "off"
		if f.cert != "" {
			mode = "require"
		}
	}
	switch {
	case mode != "off" && mode != "on" && mode != "require":
		return a, block.Errorf(block.Invalid, "--nbd-tls %q: off, on or require", f.mode)
	case mode != "off" && (f.cert == "" || f.key == ""):
		return a, block.Errorf(block.Invalid, "--nbd-tls %s needs --nbd-tls-cert and --nbd-tls-key", mode)
	case mode == "off" && (f.ca != "" || len(f.allow) > 0):
		return a, block.Errorf(block.Invalid, "--nbd-tls-ca and --nbd-allow need --nbd-tls on or require")
	case len(f.allow) > 0 && f.ca == "":
		return a, block.Errorf(block.Invalid, "--nbd-allow goes by clients' certificates: give --nbd-tls-ca")
	}
	for _, entry := range f.allow {
		volume, name, ok := strings.Cut(entry, "=")
		if !ok || volume == "" || name == "" {
			return a, block.Errorf(block.Invalid, "--nbd-allow %q: VOLUME=NAME", entry)
		}
		if a.allow == nil {
			a.allow = map[string][]string{}
		}
		a.allow[volume] = append(a.allow[volume], name)
	}
	if mode == "off" {
		return a, nil
	}
	files := &renewedCertificate{cert: f.cert, key: f.key}
	if _, err := files.get(nil); err != nil {
		return a, block.Wrap(block.Invalid, err, "NBD's TLS certificate")
	}
	a.require = mode == "require"
	a.tls = &tls.Config{GetCertificate: files.get, MinVersion: tls.VersionTLS12}
	if f.ca == "" {
		return a, nil
	}
	pem, err := os.ReadFile(f.ca)
	if err != nil {
		return a, block.Wrap(block.Invalid, err, "NBD's TLS authority")
	}
	a.tls.ClientCAs, a.tls.ClientAuth = x509.NewCertPool(), tls.RequireAndVerifyClientCert
	if !a.tls.ClientCAs.AppendCertsFromPEM(pem) {
		return a, block.Errorf(block.Invalid, "%s holds no PEM certificate", f.ca)
	}
	return a, nil
}

// renewedCertificate reads a certificate again when its file has changed. One
// that cannot be read, half written perhaps, leaves the one before in use.
type renewedCertificate struct {
	cert, key string

	mu      sync.Mutex
	changed time.Time
	pair    *tls.Certificate
}

func (r *renewedCertificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	st, err := os.Stat(r.cert)
	if err == nil && st.ModTime().Equal(r.changed) {
		return r.pair, nil
	}
	if err == nil {
		var pair tls.Certificate
		if pair, err = tls.LoadX509KeyPair(r.cert, r.key); err == nil {
			r.pair, r.changed = &pair, st.ModTime()
		}
	}
	if r.pair != nil {
		return r.pair, nil
	}
	return nil, err
}

// guard lets clients see and enter what they may.
func (a nbdAccess) guard(e nbd.Exports) nbd.Exports {
	if a.allow == nil {
		return e
	}
	return guardedExports{e, a.allow}
}

type guardedExports struct {
	nbd.Exports
	allow map[string][]string
}

// check refuses a client that may not enter a volume. The default export is
// that of Info, which names it.
func (g guardedExports) check(ctx context.Context, volume string) error {
	who, _ := nbd.ClientOf(ctx)
	if who.TLS == nil || len(who.TLS.PeerCertificates) == 0 {
		return nbd.ErrTLSRequired
	}
	names := certificateNames(who.TLS.PeerCertificates[0])
	for _, allowed := range slices.Concat(g.allow[volume], g.allow["*"]) {
		if slices.Contains(names, allowed) {
			return nil
		}
	}
	return block.Errorf(block.Denied, "the certificate of %q does not let you use this export", who.TLS.PeerCertificates[0].Subject)
}

func certificateNames(c *x509.Certificate) []string {
	names := slices.Concat([]string{c.Subject.CommonName}, c.DNSNames, c.EmailAddresses)
	for _, u := range c.URIs {
		names = append(names, u.String())
	}
	return names
}

// List implements nbd.Exports.
func (g guardedExports) List(ctx context.Context) ([]nbd.Info, error) {
	all, err := g.Exports.List(ctx)
	return slices.DeleteFunc(all, func(i nbd.Info) bool { return g.check(ctx, i.Name) != nil }), err
}

// Info implements nbd.Exports.
func (g guardedExports) Info(ctx context.Context, name string) (nbd.Info, error) {
	if name != "" {
		if err := g.check(ctx, name); err != nil {
			return nbd.Info{}, err
		}
	}
	info, err := g.Exports.Info(ctx, name)
	if err == nil {
		err = g.check(ctx, info.Name)
	}
	if err != nil {
		return nbd.Info{}, err
	}
	return info, nil
}

// Open implements nbd.Exports.
func (g guardedExports) Open(ctx context.Context, name string) (*nbd.Export, error) {
	info, err := g.Info(ctx, name)
	if err != nil {
		return nil, err
	}
	return g.Exports.Open(ctx, info.Name)
}
