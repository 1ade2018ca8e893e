package main

import (
	"crypto/tls"
	"crypto/x509"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/grpc/credentials"

	"firn.io/firn/internal/block"
)

// certFiles are PEM files: a certificate with its key, and whom to believe.
type certFiles struct{ cert, key, ca string }

// load makes a configuration of the files that are named. whose is for error texts.
func (f certFiles) load(whose string) (*tls.Config, error) {
	out := &tls.Config{MinVersion: tls.VersionTLS12}
	if f.cert != "" {
		pair, err := tls.LoadX509KeyPair(f.cert, f.key)
		if err != nil {
			return nil, block.Wrap(block.Invalid, err, "%s TLS certificate", whose)
		}
		out.Certificates = []tls.Certificate{pair}
	}
	if f.ca != "" {
		pem, err := os.ReadFile(f.ca)
		if err != nil {
			return nil, block.Wrap(block.Invalid, err, "%s TLS authority", whose)
		}
		out.RootCAs = x509.NewCertPool()
		if !out.RootCAs.AppendCertsFromPEM(pem) {
			return nil, block.Errorf(block.Invalid, "%s holds no PEM certificate", f.ca)
		}
	}
	return out, nil
}

// tlsFlags name the files of mutual TLS on gRPC: between nodes and gateways,
// and for the admin API.
type tlsFlags struct {
	cert, key, ca string
	insecure      bool
}

func (t *tlsFlags) register(cmd *cobra.Command) { t.registerOn(cmd.PersistentFlags()) }

// registerOn adds the flags to f alone, not to the commands below it.
func (t *tlsFlags) registerOn(f *pflag.FlagSet) {
	f.StringVar(&t.cert, "tls-cert", "", "PEM certificate for gRPC, for both directions")
	f.StringVar(&t.key, "tls-key", "", "PEM key of --tls-cert")
	f.StringVar(&t.ca, "tls-ca", "", "PEM certificates that the other side must be signed by")
	f.BoolVar(&t.insecure, "insecure", false, "allow gRPC beyond this machine without TLS")
}

// config returns the mutual TLS configuration, or nil if none was asked for.
func (t *tlsFlags) config() (*tls.Config, error) {
	if t.cert == "" && t.key == "" && t.ca == "" {
		return nil, nil
	}
	if t.cert == "" || t.key == "" || t.ca == "" {
		return nil, block.Errorf(block.Invalid, "--tls-cert, --tls-key and --tls-ca belong together")
	}
	config, err := certFiles{t.cert, t.key, t.ca}.load("gRPC's")
	if err != nil {
		return nil, err
	}
	config.ClientCAs, config.ClientAuth, config.MinVersion = config.RootCAs, tls.RequireAndVerifyClientCert, tls.VersionTLS13
	return config, nil
}

// guard refuses an address beyond this machine without TLS or --insecure.
func (t *tlsFlags) guard(flag, addr string) error {
	if t.cert != "" || t.insecure || isLoopback(addr) {
		return nil
	}
	return block.Errorf(block.Invalid, "%s %s is reachable from other machines: give --tls-cert, --tls-key and --tls-ca, or --insecure on a network you trust", flag, addr)
}

// client returns the credentials for a call to addr.
func (t *tlsFlags) client(addr string) (credentials.TransportCredentials, error) {
	config, err := t.config()
	if err != nil {
		return nil, err
	}
	if config == nil {
		return plaintext(), t.guard("--api", addr)
	}
	return credentials.NewTLS(config), nil
}

// server returns the credentials for a listener.
func (t *tlsFlags) server(flag, addr string) (credentials.TransportCredentials, error) {
	config, err := t.config()
	if err != nil {
		return nil, err
	}
	if config == nil {
		return plaintext(), t.guard(flag, addr)
	}
	return credentials.NewTLS(config), nil
}
